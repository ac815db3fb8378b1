"""Carrying a plan out: what one site does when it is called."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from pointillist.accel.bridge import dense_attention
from pointillist.accel.patterns import PATTERNS, Pattern
from pointillist.accel.plan import Choice, Plan
from pointillist.accel.run_state import RunState
from pointillist.accel.tiles import Tiles, tiles_of
from pointillist.kernels import BlockLayout, attention_with_pooled_tail, block_sparse_attention

LAYOUTS_KEPT = 8
"""Static layouts that a site keeps, one per grid and device: enough for a few shapes in turn."""


@dataclass
class Record:
    """What one generation really did."""

    calls: list[tuple[str, str, int, float]] = field(default_factory=list)
    """(site, branch, step, density) of every self-attention computed; density 1.0 is dense."""
    tokens: int = 0
    seconds: float = 0.0
    events: list[tuple[Any, Any]] = field(default_factory=list)
    """CUDA event pairs not yet turned into seconds."""

    def attention_seconds(self) -> float:
        """Time from final q, k, v to the output, over all calls. Waits for the device."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        self.events.clear()
        return self.seconds


class Runtime:
    """The plan of one pipeline, and the record of its latest generation."""

    def __init__(self, plan: Plan | None, minimum_tokens: int, backend: str, run: RunState) -> None:
        self.plan = plan
        self.minimum_tokens = minimum_tokens
        self.backend = backend
        self.run = run
        self.record = Record()
        self.fallbacks: dict[str, None] = {}
        self._generation = 0

    def current_record(self) -> Record:
        """The record of the generation that runs now; a new generation starts a new one."""
        if self._generation != self.run.generation:
            self._generation, self.record = self.run.generation, Record()
        return self.record

    def is_sparse_now(self, tokens: int) -> bool:
        """Whether the current step is a sparse one at this length."""
        if self.plan is None:
            return False
        if tokens < self.minimum_tokens:
            self.fallbacks[
                f"dense: {tokens} tokens are fewer than {self.minimum_tokens}, where sparse attention starts to pay"
            ] = None
            return False
        if tokens != self.run.grid[0] * self.run.grid[1] * self.run.grid[2]:
            self.fallbacks[f"dense: {tokens} tokens are not the grid {self.run.grid}"] = None
            return False
        return not self.plan.schedule.is_dense(self.run.step, self.run.sigmas)


class SiteAttention:
    """One self-attention under a plan. State: static layouts, by grid and device."""

    def __init__(self, name: str, layer: int, before: Any, runtime: Runtime) -> None:
        self.name, self.layer, self.before, self.runtime = name, layer, before, runtime
        self._static: OrderedDict[tuple, BlockLayout] = OrderedDict()

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        """q, k, v [B, S, H, D] → output [B, S, H, D]; measured, and noted in the record."""
        runtime, run = self.runtime, self.runtime.run
        record = runtime.current_record()
        record.tokens = q.shape[1]
        if q.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            out, density = self._compute(q, k, v, scale)
            end.record()
            record.events.append((begin, end))
        else:
            started = time.perf_counter()
            out, density = self._compute(q, k, v, scale)
            record.seconds += time.perf_counter() - started
        record.calls.append((f"{run.transformer}.{self.name}", run.branch, run.step, density))
        return out

    def _compute(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> tuple[torch.Tensor, float]:
        plan = self.runtime.plan
        if plan is None or not self.runtime.is_sparse_now(q.shape[1]):
            return dense_attention(q, k, v, scale, self.before), 1.0
        choices = [plan.choice_of(self.layer, head) for head in range(q.shape[2])]
        tiles = tiles_of(self.runtime.run.grid, plan.block, str(q.device))
        patterns = {choice: _pattern(choice, tiles) for choice in choices}
        density = sum(getattr(patterns[c], "keep", tiles.count) for c in choices) / (tiles.count * len(choices))
        if density == 1:
            return dense_attention(q, k, v, scale, self.before), 1.0

        order = tiles.order[0, 0]
        q, k, v = (x.transpose(1, 2).index_select(2, order) for x in (q, k, v))
        layout = self._layout(q, k, choices, patterns, tiles)
        tail = any(c.tail == "pooled" for c in choices if c.pattern != "dense")
        attend = attention_with_pooled_tail if tail else block_sparse_attention
        out = attend(q, k, v, layout, scale, backend=self.runtime.backend)
        return torch.empty_like(out).index_copy_(2, order, out).transpose(1, 2), density

    def _layout(
        self, q: torch.Tensor, k: torch.Tensor, choices: list[Choice], patterns: dict[Choice, Pattern], tiles: Tiles
    ) -> BlockLayout:
        """One layout for all heads, whatever their patterns: one launch serves the site."""
        static = all(pattern.static for pattern in patterns.values())
        key = (tiles.grid, q.shape[1], str(q.device))
        if static and key in self._static:
            self._static.move_to_end(key)
            return self._static[key]
        batch = 1 if static else q.shape[0]
        mask = torch.zeros(batch, q.shape[1], tiles.count, tiles.count, dtype=torch.bool, device=q.device)
        for choice, pattern in patterns.items():
            heads = [h for h, c in enumerate(choices) if c == choice]
            whole = len(heads) == q.shape[1]
            mask[:, heads] = pattern.mask(q if whole else q[:, heads], k if whole else k[:, heads], tiles)
        layout = BlockLayout.from_bounds(
            mask, tiles.bounds, tiles.bounds, tiles.tokens, tiles.tokens, max_query_block=tiles.largest
        )
        if static:
            self._static[key] = layout
            while len(self._static) > LAYOUTS_KEPT:
                self._static.popitem(last=False)
        return layout


def _pattern(choice: Choice, tiles: Tiles) -> Pattern:
    if choice.density == 1:
        return PATTERNS["dense"].at_density(1.0, tiles)
    return PATTERNS[choice.pattern].at_density(choice.density, tiles)
