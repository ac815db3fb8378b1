"""Patterns: rules for which key blocks a query block sees. One file each, named like the pattern.

Densities count video × video pairs only: segments of other kinds change no parameter, their pairs are always kept.
`pattern.py` says what a pattern is; `geometry.py` serves static ones, `choose.py` those that rank pairs by a score.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pointillist.accel.patterns.pattern import Pattern

PATTERNS = {
    "dense": "everything: for heads that must be exact beside sparse ones",
    "window": "the nearest tiles (STA, GNA)",
    "pooled": "the tiles of the highest pooled scores (Jenga, Sol-Attn, SpargeAttn, DraftAttention)",
    "masses": "the tiles of the most softmax mass, measured once and frozen (AdaSpa, LoSA)",
    "reorder": "blocks of the most mass in the head's best order of T, H and W (PAROAttention)",
    "antidiagonal": "blocks of the most mass, estimated from antidiagonals of scores (XAttention)",
    "skip": "nothing: the head's output is 0 or that of the last dense step (Sparse-vDiT)",
    "neighborhood": "the window around it, a box or a ball, strided or dilated (NATTEN, GNA, DiNA, CLEAR)",
    "radial": "bands in all frames, narrower with the distance in time (Radial Attention)",
    "tile": "the nearest frames and reference frames (Efficient-vDiT, LVSA)",
    "diagonal": "a band along an order of the axes (Sparse VideoGen, Sparse-vDiT)",
    "a_shape": "the first tokens and a band along an order of the axes (MInference)",
    "sla": "the tiles of the highest pooled scores, the rest linearly if trained (SLA)",
    "vsa": "the cubes of the highest coarse attention, and that attention itself if trained (VSA)",
    "moba": "chunks of frames, columns or boxes, in turn by layer, by their mean keys (VMoBA)",
    "seer": "the tiles that a trained gate points to (SeerAttention)",
    "sampled": "blocks of the strongest attention among sampled tokens (BLADE, PSA)",
    "grid": "the keys at a stride and at its best phases (MMInference, S2-Attention)",
    "vertical_slash": "the heaviest key columns and diagonals (MInference)",
    "space_time": "a band of frames, or of places in all frames, per head (Sparse VideoGen)",
    "stripe": "key tiles that all queries see, or groups of them (Sparse-vDiT, AnchorAttention)",
    "semantic": "the clusters of keys that clusters of alike queries weigh most (Sparse VideoGen 2, SVG-EAR)",
    "pyramid": "the tiles of the strongest sampled attention, the others pooled finer or coarser (PSA)",
    "random": "tiles at random: the control in comparisons",
}
"""Name → what a query sees, and whose method it is. Classes are imported on use: this module costs nothing."""


def pattern_class(name: str) -> "type[Pattern]":
    """The class of the pattern `name`, a key of `PATTERNS`."""
    module = import_module(f"{__name__}.{name}")
    return getattr(module, "".join(word.capitalize() for word in name.split("_")))
