"""Taking a part of the tokens through one transformer, with an unmodified scheduler.

In a region step the model sees the rows of the chosen tokens alone. Attention of these rows goes over all keys: those
of the others are what they last were, or continue the line through what they were in two steps. The output of the
transformer is a full grid: the velocity of each token when it was last computed, with the rows that were computed now
written over it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pointillist.accel.blocks import blocks_in
from pointillist.accel.memory import check_fits, heads_of, region_bytes
from pointillist.accel.regions.choose import aged, importance, tiles_of, tokens_of
from pointillist.accel.regions.policy import Regions
from pointillist.accel.site import Runtime
from pointillist.accel.tiles import Grid


class RegionSampling:
    """Of one transformer. All that it remembers lies in the runtime's memory, by branch and generation."""

    def __init__(
        self,
        regions: Regions,
        runtime: Runtime,
        name: str,
        family: Any,
        transformer: Any,
        branches: Callable[[str], int],
    ) -> None:
        """`branches`: how many guidance passes a step has, by the name of the first."""
        self._regions, self._runtime, self._name, self._branches = regions, runtime, name, branches
        self._family, self._transformer = family, transformer
        self.fixed: torch.Tensor | None = None
        """int64 [n]: tokens that a user chose, in place of those that matter (`Acceleration.compute_only`)."""

        self._shapes: Any = None

    def install(self) -> Callable[[], None]:
        """Returns the undo."""
        return self._family.take_rows(self._transformer, lambda: self._runtime.rows, self._full)

    def enter(self, x: torch.Tensor) -> None:
        """A call of the transformer begins, with latents x [B, C, F, H, W] or [B, N, C]."""
        runtime, state, plan = self._runtime, self._runtime.state, self._runtime.plan
        self._shapes = (x.shape, x.dtype, x.device, state.grid)
        if state.step is None or plan is None:
            return
        kinds = [plan.schedule.kind(step, state.sigmas) for step in range(len(state.sigmas))]
        if (
            state.tokens is not None and state.tokens.conditions
        ):  # x holds reference images, which are no part of a grid
            if kinds[state.step] == "region":
                runtime.record.notes["all tokens computed: there are reference images beside the tokens"] += 1
            return
        if "region" in kinds and "needed" not in self._velocity():
            self._velocity()["needed"] = self._check_memory(x, kinds, "sparse" in kinds and plan.patterns != {"dense"})
        shared = runtime.memory(f"{self._name} regions", self._shapes, every_branch=True)
        if shared.get("step") != state.step:  # once for all branches
            self._look(shared, x, kinds)
        if kinds[state.step] == "region":
            if self._velocity().get("keys"):
                runtime.rows = shared["rows"]
            else:
                runtime.record.notes["a region step computed all tokens: there was no computed step before it"] += 1
        computed = [kind for kind in kinds[state.step + 1 :] if kind != "cached"]
        whole = runtime.rows is None and kinds[state.step] != "cached"
        runtime.before_region = whole and computed[:1] == ["region"]
        runtime.keeps_keys = whole and "region" in computed[: self._regions.kept_steps]

    def leave(self, reused: bool) -> None:
        """It has ended, well or not; `reused`: a cache gave its output, so no token was computed."""
        runtime = self._runtime
        runtime.rows, runtime.keeps_keys, runtime.before_region = None, False, False
        if reused and runtime.state.step is not None:
            shared = runtime.memory(f"{self._name} regions", self._shapes, every_branch=True)
            if not shared.get("reused", True):  # once for all branches; nothing is known of reference images
                shared.update(age=shared["age before"] + 1, reused=True)
                runtime.record.ages[runtime.state.step] = shared["age"]

    def _check_memory(self, x: torch.Tensor, kinds: list[str], sparse: bool) -> int | None:
        """Bytes that all branches will keep. Raises MemoryRefusedError before anything is kept if they cannot fit."""
        runtime, state = self._runtime, self._runtime.state
        heads = heads_of(self._transformer)
        assert state.grid is not None
        if heads is None:
            return None
        x, tokens = _channels_second(x), math.prod(state.grid)
        behind = kinds[::-1].index("region")  # the last one
        whole = sum(kind in ("dense", "sparse") for kind in kinds[: len(kinds) - behind])

        def needed(regions: Regions) -> int:
            return region_bytes(
                regions.keeps(len(self._family.sites(self._transformer))), branches=branches, batch=x.shape[0],
                tokens=tokens, chosen=math.ceil(regions.share * tokens), heads=heads[0], head_dim=heads[1],
                itemsize=x.itemsize, latents=x[:, : self._family.latent_channels(self._transformer)].numel(),
                sparse=sparse, steps=min(regions.kept_steps, max(1, whole)),
            )  # fmt: skip

        branches = max(self._branches(state.branch), runtime.branches(f"{self._name} velocity"))
        total = needed(self._regions)
        runtime.record.predicted["regions"] = total
        ways: dict[str, int | None] = {}
        if self._regions.keys == "full":
            ways = {f"keys={keys}": needed(replace(self._regions, keys=keys)) for keys in ("fp8", "input")}
        if (less := needed(replace(self._regions, predictor="last"))) < total:
            ways = {"predictor=last": less, **ways}
        fewer = self._regions.layers / 2
        ways[f"layers={fewer:g}"] = needed(replace(self._regions, layers=fewer))
        ways |= {"cache='easy' keeps residuals in place of keys": None, "regions='none' nothing": None}
        what = (
            f"regions keep what {state.grid[0]}×{state.grid[1]}×{state.grid[2]} tokens of {x.shape[0]} clips need in "
            f"{len(self._family.sites(self._transformer))} layers and {branches} guidance branches"
        )
        check_fits(what, total - self._held(), x.device, ways)
        return total

    def _held(self) -> int:
        return sum(self._runtime.held(ending) for ending in (" keys", " velocity", " regions"))

    def _look(self, shared: dict[Any, Any], x: torch.Tensor, kinds: list[str]) -> None:
        """What the last step did to the tokens, and which of them this one computes."""
        state, focus = self._runtime.state, self._regions.focus
        step, grid = state.step, state.grid
        assert step is not None and grid is not None
        x = _channels_second(x)[:, : self._family.latent_channels(self._transformer)].float()
        age = shared.get("age", torch.zeros(x.shape[0], math.prod(grid), device=x.device))
        if shared.get("step") == step - 1 and not shared["reused"]:
            velocity = (x - shared["x"]) / (state.sigmas[step] - state.sigmas[step - 1])
            found = importance(velocity, shared.get("velocity"), grid, focus)
            if focus == "change" and "importance" in shared:  # a token that was not computed kept its velocity
                found = torch.where(age == 0, found, shared["importance"])
            shared.update(velocity=velocity, importance=found)
        shared["age before"], shared["reused"] = age, False
        age = age + 1
        if kinds[step] == "region":
            shared["rows"] = self._choose(shared.get("importance", torch.ones_like(age)), age, grid)
            age = age.scatter(1, shared["rows"], 0.0)
        else:
            age = torch.zeros_like(age)
        shared.update(x=x, step=step, age=age)
        self._runtime.record.ages[step] = age

    def _choose(self, importance: torch.Tensor, age: torch.Tensor, grid: Grid) -> torch.Tensor:
        """int64 [B, n]: the tokens that this step computes."""
        regions, plan = self._regions, self._runtime.plan
        if self.fixed is not None:
            if int(self.fixed.min()) < 0 or int(self.fixed.max()) >= age.shape[1]:
                raise ValueError(
                    f"tokens {int(self.fixed.min())} to {int(self.fixed.max())} are not all of this grid; "
                    f"it has those from 0 to {age.shape[1] - 1}"
                )
            return self.fixed.to(age.device).expand(age.shape[0], -1)
        score = aged(importance, age, regions.age, regions.max_age)
        if self._family.SHARED_ROWS:
            score = score.mean(0, keepdim=True).expand_as(score)
        if regions.unit == "token":
            return tokens_of(score, regions.share)
        assert plan is not None
        blocks = blocks_in("frames", grid, plan.block, age.device)
        return tiles_of(score, regions.share, blocks.order[0, 0], blocks.bounds[0, 0])

    def _velocity(self) -> dict[Any, Any]:
        """Of the running branch."""
        return self._runtime.memory(f"{self._name} velocity", self._shapes)

    def _full(self, out: torch.Tensor) -> torch.Tensor:
        """The velocity of all tokens [B, N, C], from that of the rows that were computed."""
        runtime, memory = self._runtime, self._velocity()
        if runtime.rows is not None:
            index = runtime.rows[..., None].expand(-1, -1, out.shape[-1])
            out = memory["velocity"].scatter(1, index, out)
        if runtime.state.step is not None:
            memory["velocity"] = out
            memory["keys"] = runtime.keeps_keys or runtime.rows is not None
            runtime.record.held["regions"] = max(runtime.record.held.get("regions", 0), self._held())
        return out


def _channels_second(x: torch.Tensor) -> torch.Tensor:
    """Latents of a sequence [B, N, C] as [B, C, N], those of an image [B, C, H, W] as a clip's [B, C, 1, H, W]."""
    if x.ndim == 3:
        return x.transpose(1, 2)
    return x[:, :, None] if x.ndim == 4 else x
