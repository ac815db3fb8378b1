"""What happens at one site when its q, k and v are final."""

import math
import threading

import torch

from pointillist.accel.bridge import SiteHandler
from pointillist.accel.layouts import layout_of
from pointillist.accel.patterns import PATTERNS, Pattern
from pointillist.accel.plan import Plan
from pointillist.accel.report import Call, Record
from pointillist.accel.run_state import RunState
from pointillist.accel.tiles import Grid, tile_count, tiling_of, whole_video
from pointillist.accel.timing import now
from pointillist.kernels import BREAK_EVEN, attention_with_pooled_tail, block_sparse_attention, choose_backend


class Runtime:
    """What all sites of one accelerated pipeline share: the plan, where the run is, and what has run."""

    def __init__(self, plan: Plan | None, backend: str) -> None:
        self.plan = plan
        self.state = RunState()
        self.record = Record()
        self._wish = backend
        self._backends: dict[torch.device, tuple[str, str]] = {}

    def backend(self, device: torch.device) -> tuple[str, str]:
        """What computes sparse calls on `device`, and why."""
        if device not in self._backends:
            self._backends[device] = choose_backend(device, self._wish)
        return self._backends[device]


class Site:
    """One self-attention: a layer of a transformer. No state of its own outlives a call."""

    def __init__(self, name: str, layer: int, dense: SiteHandler, runtime: Runtime) -> None:
        self.name = name
        self._layer = layer
        self._dense = dense
        self._runtime = runtime

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attention of q, k, v [B, S, H, D] as the plan says; also [B, S, H, D]."""
        state, record = self._runtime.state, self._runtime.record
        if state.thread != threading.get_ident():
            raise RuntimeError(
                f"{self.name} was reached outside of its transformer's forward call, or accelerated "
                "pipelines run in two threads at once; run one at a time in a process"
            )
        start = now(q.device)
        patterns = self._patterns(q.shape[1], q.device)
        if patterns is None:
            out, density = self._dense(q, k, v, scale), None
        else:
            out, density = self._sparse(q, k, v, scale, patterns)
        record.calls.append(Call(self.name, state.branch, state.step, density, start, now(q.device)))
        return out

    def _patterns(self, tokens: int, device: torch.device) -> tuple[Pattern, ...] | None:
        """The heads' patterns for this call, one for all or one for each; None if all of it is dense."""
        plan, state = self._runtime.plan, self._runtime.state
        grid = state.grid
        assert grid is not None, "a site runs inside a transformer call"
        if plan is None or plan.schedule.kind(state.step, state.sigmas) == "dense":
            return None
        if tokens != math.prod(grid):
            return self._fall_back(f"{tokens} tokens are not the grid {_text(grid)}")
        if tokens < plan.min_tokens:
            return self._fall_back(f"{tokens} tokens are fewer than {plan.min_tokens}, where sparse starts to pay")
        rules = plan.rules(self._layer)
        segments = whole_video(grid)
        patterns = tuple(PATTERNS[rule.pattern].at_density(rule.density, grid, segments, plan.block) for rule in rules)
        tiles = tile_count(grid, plan.block)
        if all(pattern.keep == tiles for pattern in patterns):
            return None
        density = sum(pattern.keep for pattern in patterns) / len(patterns) / tiles
        if plan.break_even and density > BREAK_EVEN[self._runtime.backend(device)[0], plan.tail == "pooled"]:
            return self._fall_back(f"density {density:.2f} is so high that sparse attention would not be faster")
        return patterns

    def _fall_back(self, reason: str) -> tuple[Pattern, ...] | None:
        self._runtime.record.fallbacks[f"dense: {reason}"] += 1
        return None

    def _sparse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        patterns: tuple[Pattern, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [B, S, H, D] and the density, 0-d."""
        plan, grid = self._runtime.plan, self._runtime.state.grid
        assert plan is not None
        assert grid is not None
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        tiling = tiling_of(grid, whole_video(grid), plan.block, q.device)
        layout, density = layout_of(patterns, q, k, tiling, scale, plan.dense_first_frame)
        attend = attention_with_pooled_tail if plan.tail == "pooled" else block_sparse_attention
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        self._runtime.record.backend = self._runtime.backend(q.device)
        out = attend(q, k, v, layout, scale=scale, backend=self._runtime.record.backend[0])
        assert isinstance(out, torch.Tensor)  # and not with its lse, which was not asked for
        return out.transpose(1, 2), density


def _text(grid: Grid) -> str:
    return "×".join(str(length) for length in grid)
