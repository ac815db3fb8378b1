"""From what was recorded to plans: for every time budget the plan with the least predicted error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from pointillist.accel.plan import Plan, Rule, Stage, Table
from pointillist.accel.regions.policy import Regions
from pointillist.accel.schedule import Schedule
from pointillist.accel.step_cache.policy import Caching
from pointillist.accel.tiles import Grid
from pointillist.search.assign import OverBudget, Problem, assign, at_price
from pointillist.search.cost_model import CostModel, RuleCost
from pointillist.search.profile import Profile
from pointillist.search.region_errors import SHARE
from pointillist.search.reuse import Reuse
from pointillist.search.site_call import SiteShape
from pointillist.search.study import Study
from pointillist.search.timeline import SparseStep, Timeline, periods, timeline

RESIDUAL_MEMORY = 4 * 2**30
"""Bytes that the residual of all sites and branches may take; else plans do without it."""
CUTS = (1, 0.98, 0.95, 0.92, 0.88, 0.84, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of a budget that are tried in turn."""
REFRESHED = (3, 4)
"""Values of `Schedule.dense_every` that are tried where steps are reused; beside none."""
ROUGHLY, PROMISING = 0.9, 3
"""So much of a budget is left when whole calls are counted; so many schedules are then looked at closely."""
REUSED = 0.05
"""What a reused step takes of the time beside attention."""
WITHIN = 0.005
"""A prediction that exceeds the wished time by this share of it is as wished."""
SIDES = (0.85, 0.7, 0.55, 0.4, 0.3)
"""Of a picture, at which a plan's crossover is looked for."""


@dataclass(frozen=True)
class DenseTimes:
    """Seconds of one dense clip's denoising."""

    attention: float
    other: float


@dataclass(frozen=True)
class Choice:
    """A plan as the search sees it."""

    tail: str
    residual: bool
    every: int
    """Of the computed steps after the first dense ones, every n-th is dense; 0 is none."""
    computed: tuple[int, ...]
    """The steps that are computed; none named: all are."""
    region_after: tuple[int, ...]
    """Behind these of them a part of the tokens is computed, up to the next one; else the steps between reuse."""
    chosen: np.ndarray
    """int64 [stages, layers, heads]: candidates by number."""
    error: float
    """Predicted mean squared error of the clip."""
    speedup: float
    """Predicted, of denoising."""
    density: float
    """Mean over calls of the steps that are not dense by schedule."""

    @property
    def psnr(self) -> float:
        """Predicted, dB."""
        return 100.0 if self.error <= 1e-10 else -10 * math.log10(self.error)

    def same_as(self, other: "Choice") -> bool:
        """Whether both are one plan."""
        mine, others = (
            (each.tail, each.residual, each.every, each.computed, each.region_after) for each in (self, other)
        )
        return mine == others and np.array_equal(self.chosen, other.chosen)


class Choices:
    """All choices that the recorded errors and a cost model offer."""

    def __init__(
        self,
        study: Study,
        profile: Profile,
        weights: np.ndarray,
        model: CostModel,
        dense: DenseTimes,
        sigmas: tuple[float, ...],
        stages: bool = False,
        reuse: tuple[Reuse, ...] = (),
    ) -> None:
        """
        Args:
            weights: [buckets, layers], mean squared error of the clip for each squared relative error of a site's.
            sigmas: of the study's steps, noisiest first.
            stages: choose anew for every step bucket; else one table serves all sparse steps.
            reuse: schedules, where steps may reuse what others gave.
        """
        self._reuse = reuse
        self.study, self.profile, self.weights, self.model, self.dense = study, profile, weights, model, dense
        self._sigmas = sigmas
        self._shape = shape_of(study, profile)
        buckets = range(len(weights))
        self.stages = tuple((bucket,) for bucket in buckets) if stages else (tuple(buckets),)
        """The buckets that each table serves."""
        self._residual = self._residual_bytes() <= RESIDUAL_MEMORY
        # what dense steps among the sparse ones are worth is known of the residual, not of patterns that learn anew
        self._periods = periods(study) if self._residual else (0,)
        self._problems: dict[tuple[str, Timeline], Problem] = {}
        self._known_costs: dict[str, tuple[list[RuleCost], float]] = {}

    @property
    def reuses(self) -> bool:
        """Whether steps may reuse what others computed."""
        return bool(self._reuse)

    @property
    def dense_call(self) -> float:
        """Predicted seconds of one dense attention call."""
        return self.model.dense(self._shape)

    def at_speedup(self, speedup: float) -> Choice:
        """The least error at a predicted speed-up of denoising. Raises OverBudget: no plan is that fast."""
        total = (self.dense.attention + self.dense.other) / speedup
        if not self._reuse:
            return self.at_attention(total - self.dense.other)
        found: list[Choice] = []
        for tail, steps, reuse in self._promising(total):
            try:
                found.append(self._within(total - self._other(steps), tail, steps, reuse))
            except OverBudget:
                continue
        return min(found, key=lambda choice: choice.error) if found else self.at_attention(total - self.dense.other)

    def _promising(self, total: float) -> list[tuple[str, Timeline, Reuse | None]]:
        """The schedules that lose least in so many seconds, by what `assign` adds up: what whole calls cost beside that
        takes longer to find out."""
        schedules: list[tuple[Timeline, Reuse | None]] = [
            (timeline(self.study, every), None) for every in self._periods
        ]
        for each in self._reuse:
            if len(each.computed) < self.study.steps:
                dense = (0,) if each.region_after else (0, *REFRESHED)
                schedules += [(timeline(self.study, every, each.computed, each.region_after), each) for every in dense]
        found: list[tuple[float, str, Timeline, Reuse | None]] = []
        for steps, reuse in sorted(schedules, key=lambda each: _error(each[1])):
            if len(found) >= PROMISING and _error(reuse) >= found[PROMISING - 1][0]:
                break
            budget = self._budget(total - self._other(steps), steps)
            for tail in self.study.tails:
                problem = self._problem_of(tail, steps)
                try:
                    error = problem.error(assign(problem, ROUGHLY * budget))
                except OverBudget:
                    continue
                found.append((error + _error(reuse), tail, steps, reuse))
            found.sort(key=lambda each: each[0])
        return [(tail, steps, reuse) for _, tail, steps, reuse in found[:PROMISING]]

    def at_attention(self, seconds: float) -> Choice:
        """The least error whose attention takes at most so many seconds of a clip of which every step is computed.
        Raises OverBudget."""
        found: list[Choice] = []
        least = math.inf
        for every in self._periods:
            steps = timeline(self.study, every)
            for tail in self.study.tails:
                try:
                    found.append(self._within(seconds, tail, steps))
                except OverBudget as error:
                    least = min(least, (error.least + self._dense_steps_seconds(steps)) * self._scale)
        if not found:
            raise OverBudget(seconds, least)
        return min(found, key=lambda choice: choice.error)

    def _within(self, seconds: float, tail: str, steps: Timeline, reuse: Reuse | None = None) -> Choice:
        """The least error of one schedule. What `assign` adds up leaves out what whole calls cost beside their heads:
        its budget is cut until the calls as they are predicted take the time. Raises OverBudget."""
        problem, budget = self._problem_of(tail, steps), self._budget(seconds, steps)
        for share in CUTS:
            try:
                choice = self._choice(tail, steps, problem, assign(problem, share * budget), reuse)
            except OverBudget:
                break
            if self.attention_seconds(choice) <= (1 + WITHIN) * seconds:
                return choice
        fastest = self._choice(tail, steps, problem, at_price(problem, 1e30), reuse)
        least = self.attention_seconds(fastest)
        if least <= seconds:
            return fastest
        raise OverBudget(budget, self._budget(least, steps))

    def budget(self, seconds: float, every: int = 0) -> float:
        """What the cost model may predict for all sparse calls, if attention may take `seconds` of a clip."""
        return self._budget(seconds, timeline(self.study, every))

    def _budget(self, seconds: float, steps: Timeline) -> float:
        return seconds / self._scale - self._dense_steps_seconds(steps)

    def of(self, chosen: np.ndarray, tail: str = "pooled", every: int = 0) -> Choice:
        """A choice made elsewhere, [stages, layers, heads], with its predictions."""
        steps, problem = timeline(self.study, every), self.problem(tail, every)
        return self._choice(tail, steps, problem, chosen.reshape(-1, chosen.shape[-1]))

    def problem(self, tail: str = "pooled", every: int = 0) -> Problem:
        """What `assign` solves; places are the layers of the first stage, then those of the second …"""
        return self._problem_of(tail, timeline(self.study, every))

    def fastest(self) -> float:
        """The greatest predicted speed-up of denoising."""
        other = self.dense.other
        if self._reuse:
            other = self._other(timeline(self.study, 0, min(self._reuse, key=lambda each: len(each.computed)).computed))
        try:
            self.at_attention(0.0)
        except OverBudget as error:
            share = other / self.dense.other
            return (self.dense.attention + self.dense.other) / (error.least * share + other)
        return (self.dense.attention + self.dense.other) / other

    def plan(self, choice: Choice, name: str, hardware: str) -> Plan:
        """The plan of a choice: a stage for every table that differs from the one before."""
        tables = self._tables(choice)
        stages = [
            Stage(table, below=self.share_before(first))
            for (before, table), first in zip(pairwise(tables), self.edges[1:], strict=True)
            if table != before
        ]
        return Plan(
            name=name,
            table=tables[0],
            stages=tuple(stages),
            tail=choice.tail,
            residual=choice.residual,
            schedule=Schedule(
                dense_above=self.share_before(self.study.dense_steps),
                dense_every=choice.every,
                computed=self._shares_of(choice.computed),
                region_after=self._shares_of(choice.region_after),
            ),
            regions=Regions(share=SHARE) if choice.region_after else None,
            cache=Caching("schedule", predictor="taylor") if choice.computed else None,
            block=self.study.block,
            break_even=False,
            model=self.study.model,
            grid=self.profile.grid,
            hardware=hardware,
            predicted={"psnr": round(choice.psnr, 3), "speedup": round(choice.speedup, 4)},
        )

    @property
    def edges(self) -> tuple[int, ...]:
        """The first step of each stage."""
        return tuple(self.study.edges[stage[0]] for stage in self.stages)

    def call_seconds(self, choice: Choice) -> np.ndarray:
        """[stages, layers]: predicted seconds of one attention call under a choice."""
        return np.array(
            [[self.site_seconds(row, choice.tail, choice.residual) for row in table] for table in self._tables(choice)]
        )

    def attention_seconds(self, choice: Choice) -> float:
        """Predicted seconds of attention in a clip."""
        return self._seconds_of(self._tables(choice), choice.tail, self._steps(choice))

    def seconds_of(self, tables: Sequence[Table], tail: str = "pooled", every: int = 0) -> float:
        """Likewise, of any tables: one for each stage, with a row for all layers or one for each."""
        return self._seconds_of(tables, tail, timeline(self.study, every))

    def _seconds_of(self, tables: Sequence[Table], tail: str, steps: Timeline) -> float:
        seconds = self._dense_steps_seconds(steps)
        for table, calls, learning in zip(tables, *self._calls(steps), strict=True):
            for layer in range(self.study.layers):
                row = table[layer if len(table) > 1 else 0]
                once, each = self.study.heads / len(row), self.site_seconds(row, tail, self._residual)
                seconds += calls * each + learning * once * sum(self._prepare(rule) for rule in row)
                if self._residual and any(rule.pattern != "dense" for rule in row):
                    seconds += learning * each  # what a sparse call loses is found out by one more
        return float(seconds) * self._scale

    def head_errors(self, choice: Choice) -> np.ndarray:
        """[stages, layers, heads]: the relative error of each head's output, mean over sparse steps."""
        steps = self._steps(choice)
        means = np.stack([self.errors(choice.tail, steps, stage) for stage in self.stages])
        return np.sqrt(np.take_along_axis(means, choice.chosen[..., None], -1)[..., 0])

    def errors(self, tail: str, steps: Timeline, buckets: tuple[int, ...]) -> np.ndarray:
        """[layers, heads, candidates]: squared relative errors, mean over a timeline's sparse steps in some buckets."""
        mine = [self._step_errors(tail, step) for step in steps.sparse if step.bucket in buckets]
        return np.mean(mine, 0) if mine else np.zeros((self.study.layers, self.study.heads, len(self.study.rules)))

    def _step_errors(self, tail: str, step: SparseStep) -> np.ndarray:
        """[layers, heads, candidates]: squared relative errors of a step.

        With w of the loss of an earlier step added, (1 − w)² + 2w·u of the loss is left, where u tells how unlike both
        losses are: 1 less the cosine between them. It is known at two ages, and about linear in age.
        """
        recorded = self.profile.errors[step.bucket, :, :, self.study.tails.index(tail)]  # [layers, rules, kinds, heads]
        plain, calibrated, recent = recorded.permute(2, 0, 3, 1).numpy()
        if not self._residual:
            return plain
        calibration, middles = self.study.calibration_step, self.study.bucket_steps
        middle, before = middles[step.bucket], (calibration, *middles)[step.bucket]

        def unlike(errors: np.ndarray, since: int) -> np.ndarray:
            share = self._shares(middle, since)
            left = np.divide(errors, plain, out=np.zeros_like(plain), where=plain > 0) - (1 - share) ** 2
            return np.maximum(left, 0) / np.maximum(2 * share, 1e-9)

        mixed = step.calibrated * unlike(calibrated, calibration) + step.recent * unlike(recent, before)
        share = self._shares(step.step, step.since)
        return plain * ((1 - share) ** 2 + 2 * share * mixed)

    def _shares(self, step: int, since: int) -> np.ndarray:
        """[candidates]: what share of an earlier step's loss is added (`tails.py`); all where a head is reused."""
        left = (self.study.steps - step) / (self.study.steps - since)
        skipped = {True: 1.0, False: 0.0}
        return np.array(
            [skipped[bool(dict(r.options).get("reuse"))] if r.pattern == "skip" else left for r in self.study.rules]
        )

    def _clip_errors(self, tail: str, steps: Timeline, buckets: tuple[int, ...]) -> np.ndarray:
        """[layers, heads, candidates]: mean squared error of the clip for choices in these buckets' sparse steps.

        What steps lose points the same way, so errors add up over steps, not their squares; likewise within a bucket,
        as whose sum its weight was measured. Stages are chosen apart although they add to one sum: as many times as
        there are stages is the most that their squares can make of it.
        """
        sizes = np.diff(self.study.edges)
        total = np.zeros((self.study.layers, self.study.heads, len(self.study.rules)))
        for step in steps.sparse:
            if step.bucket in buckets:
                squared = self.weights[step.bucket][:, None, None] * self._step_errors(tail, step)
                total += step.stands_for * np.sqrt(squared) / sizes[step.bucket]
        return len(self.stages) * np.square(total)

    def site_seconds(
        self, rules: Sequence[Rule], tail: str = "pooled", residual: bool = True, grid: Grid | None = None
    ) -> float:
        """Predicted seconds of a site's call, at the study's grid or another; one rule is for all heads."""
        shape = self._shape if grid is None else replace(self._shape, grid=grid)
        return self.model.site(rules, shape, tail=tail, residual=residual, block=self.study.block)

    def crossover(self, plan: Plan) -> int:
        """The fewest tokens at which `plan`, carried over to smaller pictures, is predicted to be faster than dense."""
        frames, height, width = self.profile.grid
        fewest = math.prod(self.profile.grid)
        for side in SIDES:
            grid = (frames, max(1, round(height * side)), max(1, round(width * side)))
            tokens = math.prod(grid)
            rows = [plan.carried(row, tokens) for table in plan.tables for row in table]
            seconds = sum(self.site_seconds(row, plan.tail, plan.residual, grid) for row in rows) / len(rows)
            if seconds >= self.model.dense(replace(self._shape, grid=grid)):
                break
            fewest = tokens
        return fewest

    def _problem_of(self, tail: str, steps: Timeline) -> Problem:
        if (tail, steps) not in self._problems:
            self._problems[tail, steps] = self._problem(tail, steps)
        return self._problems[tail, steps]

    def _problem(self, tail: str, steps: Timeline) -> Problem:
        errors = np.stack([self._clip_errors(tail, steps, stage) for stage in self.stages])
        stages, layers, heads, _ = errors.shape
        rules, residual = self.study.rules, self._residual
        costs, sparse = self._costs(tail)
        calls, learning = (np.repeat(each, layers).astype(float) for each in self._calls(steps))
        all_calls = calls + (learning if residual else 0)  # the loss is found by one call more
        per_head = np.outer(all_calls, [cost.per_head for cost in costs]) + np.outer(
            learning, [self._prepare(rule) for rule in rules]
        )
        fixed = np.outer(all_calls, [cost.fixed for cost in costs])
        return Problem(
            errors.reshape(stages * layers, heads, -1), per_head, fixed, all_calls * sparse, calls * self.dense_call
        )

    def _costs(self, tail: str) -> tuple[list[RuleCost], float]:
        """What each rule costs, and what a call costs beside: what is left of calls whose heads all have one rule."""
        if tail in self._known_costs:
            return self._known_costs[tail]
        rules, residual, block = self.study.rules, self._residual, self.study.block
        costs = [self.model.rule(rule, self._shape, tail=tail, residual=residual, block=block) for rule in rules]
        alone = [self.site_seconds([rule], tail, residual) for rule in rules]
        rest = [
            whole - self._shape.heads * cost.per_head - cost.fixed for whole, cost in zip(alone, costs, strict=True)
        ]
        self._known_costs[tail] = costs, max(0.0, min(rest[1:]))  # the first rule is dense, whose call is another
        return self._known_costs[tail]

    def _prepare(self, rule: Rule) -> float:
        """Seconds that a head with it adds to a dense step that sparse ones learn from."""
        return self.model.prepare(rule, self._shape, block=self.study.block)

    def _tables(self, choice: Choice) -> list[Table]:
        rules = self.study.rules
        return [
            tuple(_row(tuple(rules[index] for index in row)) for row in layers) for layers in choice.chosen.tolist()
        ]

    def _calls(self, steps: Timeline) -> tuple[np.ndarray, np.ndarray]:
        """[stages]: how many sparse calls a site has in each, and how many of its dense ones are learnt from."""
        sparse, learning = (np.array([of(stage) for stage in self.stages]) for of in (steps.calls, steps.learning))
        return sparse * self.profile.branches, learning * self.profile.branches

    def _residual_bytes(self) -> int:
        """Of all sites, branches and stages: as much as q each."""
        tokens, itemsize = math.prod(self.profile.grid), torch.finfo(getattr(torch, self.study.dtype)).bits // 8
        per_site = self._shape.batch * self.study.heads * tokens * self.study.head_dim * itemsize
        return per_site * self.study.layers * self.profile.branches * len(self.stages)

    def _choice(
        self, tail: str, steps: Timeline, problem: Problem, chosen: np.ndarray, reuse: Reuse | None = None
    ) -> Choice:
        computed, after = (reuse.computed, reuse.region_after) if reuse is not None else ((), ())
        shape = (len(self.stages), self.study.layers, -1)
        error = problem.error(chosen) + _error(reuse)
        choice = Choice(tail, self._residual, steps.every, computed, after, chosen.reshape(shape), error, 0.0, 0.0)
        attention = self.attention_seconds(choice)
        kept = np.array([rule.kept for rule in self.study.rules])[choice.chosen]
        calls = self._calls(steps)[0]
        density = float(np.average(kept.mean((1, 2)), weights=calls)) if calls.any() else 1.0
        total = self.dense.attention + self.dense.other
        return replace(choice, speedup=total / (attention + self._other(steps)), density=density)

    def _steps(self, choice: Choice) -> Timeline:
        return timeline(self.study, choice.every, choice.computed, choice.region_after)

    def _other(self, steps: Timeline) -> float:
        """Seconds beside attention: reused steps have only what stands around the blocks."""
        share = (steps.computed + SHARE * steps.regions) / self.study.steps
        return self.dense.other * (share + REUSED * (1 - share))

    @property
    def _scale(self) -> float:
        """Attention in a dense clip as it was measured over what is predicted: only ratios are taken from the model."""
        return self.dense.attention / (self.study.steps * self.profile.branches * self.study.layers * self.dense_call)

    def _dense_steps_seconds(self, steps: Timeline) -> float:
        """With region steps, which attend densely from a part of the tokens."""
        whole = steps.dense + SHARE * steps.regions
        return whole * self.profile.branches * self.study.layers * self.dense_call

    def _shares_of(self, steps: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(round(self._sigmas[step] / self._sigmas[0], 6) for step in steps)

    def share_before(self, step: int) -> float:
        """A share of the first sigma between those of a step and the one before it."""
        if step == 0:
            return 1.0
        return round((self._sigmas[step - 1] + self._sigmas[step]) / 2 / self._sigmas[0], 6)


def shape_of(study: Study, profile: Profile) -> SiteShape:
    """Of one attention call: both guidance branches are in it where they do not come one after the other."""
    batch = 1 if profile.branches > 1 or study.call.get("guidance_scale", 1) <= 1 else 2
    return SiteShape(profile.grid, batch, study.heads, study.head_dim)


def _error(reuse: Reuse | None) -> float:
    return 0.0 if reuse is None else reuse.error


def _row(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """One rule for all heads where all have the same."""
    return rules[:1] if len(set(rules)) == 1 else rules
