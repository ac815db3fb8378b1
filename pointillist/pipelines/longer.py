"""Clips longer than a model was trained for: the positions of their frames are put into the range that it knows.

Beyond that range a model is lost: the first picture has wrong colours, and motions do not start. Position interpolation
(Chen et al. 2023, for text) puts all frames into it, so that motions take the whole clip and neighbours are less than
one apart. The first latent frame keeps its distance of one to the second: in video autoencoders that are causal in time
it is one picture and the others are several, and a model knows it by that place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pointillist.accel.plan import Plan

EMBEDDED_KNOWN = 9
"""Latent frames that the embedded model was trained on."""


def keep_positions_in_range(transformer: Any, known: int) -> Callable[[], None]:
    """Let a Wan transformer place the frames of longer clips where those of `known` latent frames were.

    Clips that are not longer stay as they are, in every bit. Returns the undo.
    """
    import torch

    def placed(rope: Any, args: tuple[Any, ...], tables: tuple[torch.Tensor, torch.Tensor]) -> Any:
        frames = args[0].shape[2] // rope.patch_size[0]
        if frames <= known:
            return None
        height, width = args[0].shape[3] // rope.patch_size[1], args[0].shape[4] // rope.patch_size[2]
        if tables[0].shape[1] != frames * height * width:
            raise RuntimeError(
                "positions of a clip that is longer than the model knows were split before they could be placed; split "
                "the pipeline by pointillist's parallelize() instead of enable_parallelism()"
            )
        one = torch.atan2(rope.freqs_sin[1, : rope.t_dim].double(), rope.freqs_cos[1, : rope.t_dim].double())
        angles = positions(frames, known).to(one)[:, None] * one
        return tuple(
            torch.cat([_each_token(of(angles).to(table), table), table[..., rope.t_dim :]], dim=-1)
            for of, table in zip((torch.cos, torch.sin), tables, strict=True)
        )

    hook = transformer.rope.register_forward_hook(placed)
    transformer.rope.known_frames = known

    def undo() -> None:
        hook.remove()
        del transformer.rope.known_frames

    return undo


def positions(frames: int, known: int) -> torch.Tensor:
    """float64 [frames]: from 0 to `known` − 1. Both are latent frames, `known` of them more than two."""
    import torch

    others = 1 + torch.arange(frames - 1, dtype=torch.float64) * (known - 2) / max(1, frames - 2)
    return torch.cat([others.new_zeros(1), others])


def linear_plan(frames: int, known: int = EMBEDDED_KNOWN) -> Plan:
    """A plan whose cost grows linearly with the clip: each query sees as many latent frames as the model knows.

    They are spread over the whole clip, so that they lie where those of a known clip lie, its two ends among them; of
    the frame of the query's own, or the nearest one, there is one more.
    """
    from pointillist.accel.plan import Plan, Rule
    from pointillist.accel.schedule import Schedule

    rule = Rule("tile", min(1.0, (known + 1) / frames), (("ends", True), ("share", known / (known + 1))))
    return Plan(
        name=f"{known} of {frames} latent frames", table=((rule,),), schedule=Schedule(), block=64, break_even=False
    )


def note_on_length(transformer: Any, frames: int) -> tuple[str, ...]:
    """What was done about a clip of so many latent frames; nothing if the model knows that length."""
    known = getattr(getattr(transformer, "rope", None), "known_frames", frames)
    if frames <= known:
        return ()
    return (
        f"the clip is longer than the model knows: its {frames} latent frames are placed where the model learned "
        f"{known}, so motions take longer",
    )


def _each_token(by_frame: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Columns of frames [F, D] for all tokens of a table [1, F · h · w, 1, …]."""
    return by_frame.repeat_interleave(table.shape[1] // len(by_frame), dim=0)[None, :, None]
