"""What a plan does: in every step of a clip that it made, or, without a clip, in every part of the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointillist.accel.choose_plan import shipped_files
from pointillist.accel.plan import Plan, PlanError, Rule, Table
from pointillist.pipelines.generate import GenerateRequest
from pointillist.search import report
from pointillist.search.record import SearchRecord

DENSE = Rule("dense", 1.0)


@dataclass(frozen=True)
class View:
    """Steps in which every head does one thing."""

    label: str
    kind: str
    """Of the step: `dense`, `sparse`, `cached` or `region`."""
    phase: report.Phase


@dataclass(frozen=True)
class Planned:
    """A plan, and how a search found it if one did."""

    plan: Plan
    record: SearchRecord | None = None

    @classmethod
    def load(cls, path: Path) -> Planned:
        """Raises PlanError."""
        return cls(Plan.load(path), SearchRecord.load(path))

    @property
    def views(self) -> tuple[View, ...]:
        """Every phase of it."""
        phases = report.phases(self.plan, self.record)
        return tuple(View(each.title, "sparse", each) for each in phases)


def shipped(model: str = "") -> dict[str, Path]:
    """The plans that come with the package, by their names; those of a model, or all."""
    found = ((Plan.load(path), path) for path in shipped_files())
    return {plan.name: path for plan, path in found if model in ("", plan.model)}


def plan_of(facts: dict[str, Any], request: GenerateRequest) -> Planned | None:
    """The plan of a clip by its facts; None if it had none, or it is not here any more."""
    try:
        if request.pattern is not None:
            return Planned(request.uniform_plan(facts["steps"]))
        if request.plan not in (None, "auto", "none"):
            return Planned.load(Path(request.plan))
        path = shipped().get(str(facts.get("plan")))
        return None if path is None else Planned.load(path)
    except PlanError:
        return None


def views_of(facts: dict[str, Any], planned: Planned | None) -> tuple[View, ...]:
    """What every head did in every step of a clip. Its facts must have `kinds`, `sigmas`, `grid`, `heads`, `call_ms`.

    Raises PlanError if the plan is none of the clip's model.
    """
    sites, heads = list(facts["call_ms"]), int(facts["heads"])
    transformers = dict.fromkeys(site.partition(".")[0] for site in sites)
    layers = sum(site.startswith(f"{next(iter(transformers), '')}.") for site in sites)
    sigmas, tokens = facts["sigmas"], math.prod(facts["grid"])
    views = []
    for step, kind in enumerate(facts["kinds"]):
        share = sigmas[step] / sigmas[0]
        table: Table = ((DENSE,) * heads,) * layers
        buckets: tuple[int, ...] = ()
        if planned is not None and kind in ("sparse", "region"):
            table = report.table_at(planned.plan, share, "", layers, heads)
            table = tuple(planned.plan.carried(row, tokens) for row in table)
            buckets = report.bucket_of(() if planned.record is None else planned.record.boundaries, share)
        views.append(View(f"step {step}: {kind}", kind, report.Phase(share, share, "", table, buckets)))
    return tuple(views)
