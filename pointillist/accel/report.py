"""What really ran: the record that a running generation writes, and the report made from it."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch

from pointillist.accel.memory import size
from pointillist.accel.tiles import Grid
from pointillist.accel.timing import Moment, seconds_between


class AttentionCall(NamedTuple):
    """One attention call. Moments and the density stay on their device until a report is asked for."""

    site: str
    branch: str
    step: int | None
    density: torch.Tensor | None
    """0-d; None if the call was dense."""
    start: Moment
    end: Moment
    part: bool = False
    """Whether a part of the tokens was computed."""

    @property
    def kind(self) -> str:
        """`dense`, `sparse` or `region`."""
        return "region" if self.part else "dense" if self.density is None else "sparse"


@dataclass
class Record:
    """Facts of one generation."""

    calls: list[AttentionCall] = field(default_factory=list)
    first_call: Moment | None = None
    step_ends: list[Moment] = field(default_factory=list)
    """When the scheduler had taken each of its steps."""
    warnings: list[str] = field(default_factory=list)
    """What does not go well together."""
    notes: Counter[str] = field(default_factory=Counter)
    """Fallbacks by their reasons, and whatever else a user should know."""
    grid: Grid | None = None
    heads: int = 0
    backend: tuple[str, str] | None = None
    """Name and reason, once a sparse call has run."""
    decisions: list[tuple[int, str, bool, float | None]] = field(default_factory=list)
    """Of the step cache: step, branch, whether it was reused, and the distance that decided."""
    caching: str = ""
    """The step cache, in words; "" where there is none."""
    modules: tuple[int, int] | None = None
    """How many modules were computed, and how many reused, where a table says which."""
    held: dict[str, int] = field(default_factory=dict)
    """Bytes that parts remembered at most."""
    predicted: dict[str, int] = field(default_factory=dict)
    """And how many were expected, before anything was kept."""
    ages: dict[int, torch.Tensor] = field(default_factory=dict)
    """[B, N] by step: for how many steps each token had not been computed, where regions are sampled."""
    balance: tuple[float, float] | None = None
    """Where heads are spread over processes: what the busiest has to do, over the mean, before and after spreading."""


@dataclass(frozen=True)
class Report:
    """The last generation. `str()` of it is a table."""

    plan: str
    plan_source: str
    backend: str
    backend_reason: str
    dense_backend: str
    """What computed the dense calls, and why it."""
    dense_reason: str
    density: float | None
    """Mean over the sparse calls; None if there were none."""
    density_overall: float
    """Mean over all calls, dense ones counting 1."""
    density_per_site: dict[str, float]
    """Mean over the sparse calls of each site; 1 where there were none."""
    steps: dict[str, int]
    """How many steps were `dense`, `sparse`, `cached`, `region`."""
    attention_seconds: float
    """Inside self-attention, from final q, k, v to its output; selection and layout included."""
    denoise_seconds: float
    """From the first transformer call to the end of the last scheduler step."""
    tokens: int
    fallbacks: list[str]
    """What ran densely although the plan said sparse, and why."""
    kinds: tuple[str, ...] = ()
    """Of every step in turn."""
    cache: str = ""
    """What decided which steps to reuse."""
    distances: dict[int, float] = field(default_factory=dict)
    """What the step cache went by, the first branch's, where it had to decide."""
    held: dict[str, int] = field(default_factory=dict)
    """Bytes that parts remembered at most."""
    predicted: dict[str, int] = field(default_factory=dict)
    """And how many were expected, before anything was kept; more than fit are refused."""
    ages: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """By step: how many tokens had not been computed for 0, 1, 2 … steps, where regions are sampled."""
    refreshed: tuple[float, ...] = ()
    """In what share of the steps each token was computed, likewise."""
    grid: Grid = (0, 0, 0)
    balance: tuple[float, float] | None = None
    """What the busiest of several processes has to do, over the mean of all: with the heads in the model's order, and
    as they were spread. None where one process has all heads."""
    heads: int = 0
    """Of a site."""
    step_seconds: tuple[float, ...] = ()
    """Of every step in turn, to the end of the scheduler's step."""
    call_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each site, the mean seconds of its `dense`, `sparse` and `region` calls, where there were such."""

    @property
    def skipped(self) -> float:
        """The share of steps that were not computed."""
        return self.steps["cached"] / max(1, len(self.kinds))

    def __str__(self) -> str:
        steps = ", ".join(f"{count} {kind}" for kind, count in self.steps.items() if count) or "none"
        rows = [
            ("plan", f"{self.plan} ({self.plan_source})"),
            ("backend", f"{self.backend} ({self.backend_reason})"),
            ("dense", f"{self.dense_backend} ({self.dense_reason})"),
            ("tokens", f"{self.tokens:,}"),
            ("steps", steps),
            (
                "density",
                "no sparse call" if self.density is None else f"{self.density:.3f} over sparse calls",
            ),
            ("", f"{self.density_overall:.3f} over all calls"),
            ("attention", f"{self.attention_seconds:.2f} s of {self.denoise_seconds:.2f} s of denoising"),
            *([("cache", f"{self.cache}: {self.skipped:.0%} of the steps reused")] if self.cache else []),
            *([("heads", _spread(self.balance))] if self.balance else []),
            *(("memory", f"{part}: {size(count)}") for part, count in self.held.items()),
            *(("fallback", reason) for reason in self.fallbacks),
        ]
        return "\n".join(f"{name:<10} {value}" for name, value in rows)


def _spread(balance: tuple[float, float]) -> str:
    before, after = balance
    return f"the busiest process has {after:.2f}× the mean to do; {before:.2f}× in the model's own order"


def make_report(record: Record, plan: str, plan_source: str, dense_backend: tuple[str, str]) -> Report:
    """Waits for the device, so it is for after a generation."""
    densities: defaultdict[str, list[float]] = defaultdict(list)
    for call in record.calls:
        if call.density is not None:
            densities[call.site].append(float(call.density))
    steps = _kinds(record)
    notes = [*record.warnings, *(f"{reason} ({count} calls)" for reason, count in record.notes.items())]
    scheduled = record.caching.startswith("schedule") and "region" in steps.values()  # in place of reused ones
    reused = "cached" in steps.values() or scheduled
    if record.caching and record.decisions and record.modules is None and not reused:
        helps = not record.caching.startswith("schedule") and not any(note.startswith("cache inert") for note in notes)
        notes.append("cache: no step was reused" + ("; a greater threshold would" if helps else ""))
    sparse = [density for each in densities.values() for density in each]
    calls = len(record.calls)
    sites = dict.fromkeys(call.site for call in record.calls)
    backend, reason = record.backend or (dense_backend[0], "every call was dense")
    denoise = 0.0
    moments = [record.first_call, *record.step_ends] if record.first_call is not None else []
    if len(moments) > 1:
        denoise = seconds_between(moments[0], moments[-1])
    return Report(
        plan=plan,
        plan_source=plan_source,
        backend=backend,
        backend_reason=reason,
        dense_backend=dense_backend[0],
        dense_reason=dense_backend[1],
        density=_mean(sparse) if sparse else None,
        density_overall=(sum(sparse) + calls - len(sparse)) / calls if calls else 1.0,
        density_per_site={site: _mean(densities[site]) if site in densities else 1.0 for site in sites},
        steps={kind: list(steps.values()).count(kind) for kind in ("dense", "sparse", "cached", "region")},
        attention_seconds=sum(seconds_between(call.start, call.end) for call in record.calls),
        denoise_seconds=denoise,
        tokens=record.grid[0] * record.grid[1] * record.grid[2] if record.grid else 0,
        fallbacks=notes,
        kinds=tuple(steps[step] for step in sorted(steps)),
        cache=_cache(record),
        distances=_distances(record),
        held=dict(record.held),
        predicted=dict(record.predicted),
        refreshed=_refreshed(record),
        grid=record.grid or (0, 0, 0),
        heads=record.heads,
        step_seconds=tuple(seconds_between(begin, end) for begin, end in pairwise(moments)),
        call_seconds=_call_seconds(record),
        balance=record.balance,
        ages={step: tuple(age.long().flatten().bincount().tolist()) for step, age in record.ages.items()},
    )


def _kinds(record: Record) -> dict[int, str]:
    """Of every step; one is cached if no branch computed it."""
    steps: dict[int, str] = {}
    for call in record.calls:
        if call.step is not None and (call.density is not None or call.part or call.step not in steps):
            steps[call.step] = call.kind
    computed = {step for step, _, reused, _ in record.decisions if not reused}
    for step, *_ in record.decisions:
        if step not in computed:
            steps[step] = "cached"
        steps.setdefault(step, "dense")  # of a model whose attention is not followed
    return steps


def _call_seconds(record: Record) -> dict[str, dict[str, float]]:
    seconds: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for call in record.calls:
        seconds[call.site][call.kind].append(seconds_between(call.start, call.end))
    return {site: {kind: _mean(each) for kind, each in kinds.items()} for site, kinds in seconds.items()}


def _refreshed(record: Record) -> tuple[float, ...]:
    if not record.ages:
        return ()
    computed = [age[0] == 0 for step, age in sorted(record.ages.items())]
    return tuple(torch.stack(computed).float().mean(0).tolist())


def _cache(record: Record) -> str:
    if record.modules is None:
        return record.caching
    computed, reused = record.modules
    return f"{record.caching}, {reused / max(1, computed + reused):.0%} of the modules reused"


def _distances(record: Record) -> dict[int, float]:
    found: dict[int, float] = {}
    for step, _, _, distance in record.decisions:
        if distance is not None:
            found.setdefault(step, distance)
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
