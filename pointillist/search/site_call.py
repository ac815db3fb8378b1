"""One attention call of a site as the runtime makes it, on made-up q, k and v: to be counted, or timed."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pointillist.accel.layouts import Group, lay_out, pattern_for, select, sub_call
from pointillist.accel.patterns.pattern import Call, Pattern
from pointillist.accel.plan import Rule
from pointillist.accel.tails import attend
from pointillist.accel.tiles import Grid, whole_video


@dataclass(frozen=True)
class SiteShape:
    """What a site computes in one call: batch · heads attentions of the grid's tokens."""

    grid: Grid
    batch: int
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        sizes = (*self.grid, self.batch, self.heads, self.head_dim)
        if len(self.grid) != 3 or not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(f"{self} must have a grid (T, H, W) and whole numbers, each at least 1")

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Way:
    """What a plan says of a site's calls beside the rules of its heads: see `Plan`."""

    tail: str = "none"
    residual: bool = False
    block: int = 128
    hoist: str = ""
    dtype: torch.dtype = torch.float32
    backend: str = "cpu"
    """`cpu` or `triton`: whose attention is counted."""


class SiteCall:
    """Sparse calls of a site as the runtime makes them, on random q, k and v, behind a dense step."""

    def __init__(self, rules: Sequence[Rule], shape: SiteShape, way: Way, device: torch.device | str = "cpu") -> None:
        size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
        generator = torch.Generator(device)  # the global one is the user's
        self._q, self._k, self._v = (
            torch.randn(size, generator=generator, device=device, dtype=way.dtype) for _ in range(3)
        )
        self._shape, self._way = shape, way
        heads: dict[Pattern, list[int]] = {}
        segments = whole_video(shape.grid)
        for head, rule in enumerate(rules):
            pattern = pattern_for(rule.pattern, rule.density, rule.options, shape.grid, segments, way.block)
            heads.setdefault(pattern, []).append(head)
        self._groups = [Group(each, None if len(heads) == 1 else tuple(mine)) for each, mine in heads.items()]
        self._memory: dict[Any, Any]
        self.prepare()

    def dense(self) -> torch.Tensor:
        """The dense call, [B, S, H, D]."""
        q, k, v = (x.transpose(1, 2) for x in (self._q, self._k, self._v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def __call__(
        self, choosing: AbstractContextManager | None = None, laying: AbstractContextManager | None = None
    ) -> torch.Tensor:
        """The call, [B, S, H, D]; its two parts run within these contexts."""
        call = self._call(step=2)
        with choosing or nullcontext():
            parts = [(group, select(group, call)) for group in self._groups]
        with laying or nullcontext():
            out = attend(call, lay_out(parts, call), self._way.tail)
            for group in self._groups:
                if type(group.pattern).finish is not Pattern.finish:
                    finished = group.pattern.finish(sub_call(group, call), group.of(out))
                    out = finished if group.heads is None else out.index_copy(1, group.index(out.device), finished)
        return out.transpose(1, 2)

    def order(self) -> str | None:
        """The name of the order of blocks that all heads share; None if they differ."""
        found = [select(group, self._call(step=2)) for group in self._groups]
        blocks = {each for selection in found for each in (selection.queries, selection.keys)}
        return blocks.pop().name or None if len(blocks) == 1 else None

    def _call(self, step: int) -> Call:
        q, k, v = (x.transpose(1, 2) for x in (self._q, self._k, self._v))
        shape, way = self._shape, self._way
        return Call(
            q, k, v, shape.head_dim**-0.5, shape.grid, whole_video(shape.grid), way.block, hoist=way.hoist,
            step=step, steps=10, memory=self._memory,
        )  # fmt: skip

    def prepare(self, context: AbstractContextManager | None = None) -> None:
        """What patterns do at the last dense step, whose values do not matter here; it runs within the context."""
        self._memory = {}
        call, out = self._call(step=1), torch.zeros_like(self._q).transpose(1, 2)
        with context or nullcontext():
            for group in self._groups:
                group.pattern.prepare(sub_call(group, call), group.of(out))
        if self._way.residual:
            self._memory |= {"lost output": out, "lost at": 1}
        if self._way.tail == "rescaled":
            self._memory |= {"kept mass": out[..., :1].float(), "rest": out}
