"""What every model family is checked against: dense attention with a mask over tokens, put into torch's own by a mode.

What the reference knows of the models (where their self-attentions are, and where the video's tokens begin) is written
down here once more.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from families import TEXT, Family
from pointillist import Plan, accelerate
from pointillist.accel.layouts import pattern_for
from pointillist.accel.patterns.pattern import Call
from pointillist.accel.tiles import whole_video

SPARSE = Plan.uniform("window", 0.4, tail="none", block=16)
BOTH = r"(single_)?transformer_blocks\.\d+\.attn"


def captions(call: dict[str, Any]) -> torch.Tensor:
    return call["encoder_attention_mask"].sum(1)


@dataclass(frozen=True)
class Facts:
    """What the reference knows of a model, from its source."""

    sites: str
    """The names of all self-attentions match it."""
    grid: tuple[int, int, int] = (1, 8, 8)
    """Of tokens, at 64 × 64 pixels."""
    start: int | Callable[[dict[str, Any]], torch.Tensor] = 0
    """Where the video's tokens begin in the sequence; in every entry of the batch, from the arguments of the call."""
    masks: bool = False
    """Whether it masks padding of prompts, wherever it sees them."""
    ragged: bool = False
    """Whether prompts of a batch may be of unequal length."""
    batch: int = 2
    """At most so many prompts at once."""
    shapes: tuple[Any, ...] = (64, (64, 96))
    """Two shapes to run."""


VIDEO = (3, 4, 4)
FACTS = {
    "wan": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "wan2.2-a14b": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "wan2.2-ti2v-5b": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "wan-i2v": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "wan-vace": Facts(r"(vace_)?blocks\.\d+\.attn1", VIDEO, batch=1),
    "hunyuan-video": Facts(BOTH, VIDEO, masks=True, ragged=True),
    "hunyuan-video-1.5": Facts(BOTH, VIDEO, masks=True, ragged=True),
    "cogvideox": Facts(r"transformer_blocks\.\d+\.attn1", VIDEO, start=TEXT),
    "cogvideox-1.5": Facts(r"transformer_blocks\.\d+\.attn1", (2, 4, 4), start=TEXT),
    "ltx": Facts(r"transformer_blocks\.\d+\.attn1", (3, 8, 8), masks=True, ragged=True),
    "ltx-2": Facts(r"transformer_blocks\.\d+\.attn1", (2, 4, 4)),
    "mochi": Facts(r"transformer_blocks\.\d+\.attn1", VIDEO, masks=True, ragged=True),
    "skyreels-v2": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "cosmos": Facts(r"transformer_blocks\.\d+\.attn1", VIDEO),
    "flux": Facts(BOTH, start=TEXT),
    "flux-kontext": Facts(BOTH, start=TEXT),
    "visualcloze": Facts(BOTH, start=TEXT, shapes=(64, 96)),
    "flux-2": Facts(BOTH, start=TEXT),
    "chroma": Facts(BOTH, start=TEXT, masks=True, ragged=True),
    "sd3": Facts(r"transformer_blocks\.\d+\.attn2?"),
    "sd3.5": Facts(r"transformer_blocks\.\d+\.attn2?"),
    "pixart": Facts(r"transformer_blocks\.\d+\.attn1", masks=True, ragged=True),
    "qwen-image": Facts(BOTH, start=TEXT, masks=True, ragged=True),
    "qwen-image-edit": Facts(BOTH, start=TEXT, masks=True, batch=1),
    "nucleus-moe": Facts(BOTH, masks=True, ragged=True),
    "lumina-next": Facts(r"layers\.\d+\.attn1", masks=True, ragged=True),
    "lumina-2": Facts(r"layers\.\d+\.attn", start=captions, masks=True, ragged=True),
    "hidream": Facts(r"(double|single)_stream_blocks\.\d+\.block\.attn1", shapes=(64, (64, 144))),  # it keeps the area
    "z-image": Facts(r"layers\.\d+\.attention", ragged=True),
}


def grid_at(name: str, size: int | tuple[int, int]) -> tuple[int, int, int]:
    frames, height, width = FACTS[name].grid
    rows, columns = (size, size) if isinstance(size, int) else size
    return frames, height * rows // 64, width * columns // 64


class Reference(TorchFunctionMode):
    """Leaves pairs out of torch's attention, token by token, inside the self-attentions of some transformers."""

    def __init__(self, kept: torch.Tensor, start: int | Callable[[dict[str, Any]], torch.Tensor]) -> None:
        super().__init__()
        self._kept, self._start = kept, start
        self.call: dict[str, Any] = {}
        self.inside = False
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention and self.inside:
            args, kwargs = self._masked(*args, **kwargs or {})
        return func(*args, **kwargs or {})

    def _masked(self, query, key, value, attn_mask=None, **kwargs):
        self.calls += 1
        batch, rows, columns = query.shape[0], query.shape[2], key.shape[2]
        starts = self._start(self.call).tolist() if callable(self._start) else [self._start] * batch
        mask = torch.ones(batch, 1, rows, columns, dtype=torch.bool)
        video = len(self._kept)
        for entry, start in zip(mask, starts, strict=True):
            entry[0, start : start + video, start : start + video] = self._kept
        if attn_mask is not None:
            assert attn_mask.dtype == torch.bool
            mask = mask & attn_mask
        return (query, key, value), dict(kwargs, attn_mask=mask)


@contextmanager
def reference(family: Family, size: int | tuple[int, int]) -> Iterator[Reference]:
    facts, grid = FACTS[family.name], grid_at(family.name, size)
    mode, hooks = Reference(kept_pairs(grid), facts.start), []
    for transformer in transformers(family):
        hooks.append(
            transformer.register_forward_pre_hook(lambda _, __, call: mode.call.update(call), with_kwargs=True)
        )
        for module in self_attentions(family.name, transformer).values():
            hooks.append(module.register_forward_pre_hook(lambda *_: setattr(mode, "inside", True)))
            hooks.append(module.register_forward_hook(lambda *_: setattr(mode, "inside", False)))
    try:
        with mode:
            yield mode
    finally:
        for hook in hooks:
            hook.remove()


def kept_pairs(grid: tuple[int, int, int]) -> torch.Tensor:
    """bool [N, N]: what the plan's pattern keeps, of each token's block."""
    pattern = pattern_for("window", 0.4, (), grid, whole_video(grid), 16)
    nothing = torch.empty(0)
    found = pattern.select(Call(nothing, nothing, nothing, 1.0, grid, whole_video(grid), 16))
    order, bounds = found.queries.order[0, 0].tolist(), found.queries.bounds[0, 0].tolist()
    assert found.keys.order[0, 0].tolist() == order
    of_token = torch.empty(len(order), dtype=torch.int64)
    for block, (first, last) in enumerate(pairwise(bounds)):
        of_token[order[first:last]] = block
    return found.mask[0, 0][of_token][:, of_token]


def transformers(family: Family) -> list[Any]:
    found = (getattr(family.pipe, name, None) for name in ("transformer", "transformer_2"))
    return [each for each in found if each is not None]


def self_attentions(name: str, transformer: Any) -> dict[str, torch.nn.Module]:
    return {path: each for path, each in transformer.named_modules() if re.fullmatch(FACTS[name].sites, path)}


def check_sparse(family: Family, size: int | tuple[int, int] = 64, **call: Any) -> torch.Tensor:
    """The latents of a sparse run, which are the reference's."""
    with accelerate(family.pipe, SPARSE) as handle:
        sparse = family.run(size, steps=2, **call)
        report, grid = handle.report(), handle.grid
    assert grid == grid_at(family.name, size) and not report.fallbacks and report.steps["sparse"] == 2
    with reference(family, size) as mode:
        expected = family.run(size, steps=2, **call)
    assert mode.calls >= 2 * len(report.density_per_site) / len(transformers(family))
    assert report.density == pytest.approx(float(kept_pairs(grid).float().mean()), abs=1e-6)
    torch.testing.assert_close(sparse, expected, atol=5e-4, rtol=1e-3)
    return sparse
