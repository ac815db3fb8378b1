"""`accelerate`: install a plan in a pipeline, report what it did, take it out again."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from pointillist.accel import conflicts
from pointillist.accel.bridge import Bridge, backend_before, is_bridgeable
from pointillist.accel.conflicts import AccelerateError
from pointillist.accel.models import wan
from pointillist.accel.plan import Choice, Plan
from pointillist.accel.plans import shipped_plans
from pointillist.accel.report import Report, make_report
from pointillist.accel.run_state import RunState
from pointillist.accel.runtime import Runtime, SiteAttention
from pointillist.accel.schedule import Schedule
from pointillist.kernels import choose_backend


def accelerate(
    pipe: Any,
    plan: Plan | str | Path = "auto",
    cache: str | None = "auto",
    regions: str | None = "auto",
    backend: str = "auto",
) -> Handle:
    """Make `pipe` compute its self-attention by a plan, in place.

    Args:
        pipe: a Diffusers pipeline with a supported transformer.
        plan: "auto" (a shipped plan for this model, else the family's preset), "none" (dense, only measured), a
            `Plan`, or the path of a plan file.
        cache, regions: "auto" (what the plan says) or "none".
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A handle with `.report()` and `.restore()`; it is a context manager too.

    Raises:
        AccelerateError: the pipeline cannot be accelerated as asked. Nothing was changed.
        PlanError: the plan file is not a valid plan.
    """
    conflicts.check(pipe, cache, regions)
    transformers = conflicts.transformers_of(pipe)
    first = next(iter(transformers.values()))
    try:
        backend_name, backend_reason = choose_backend(first.device, backend)
    except ValueError as error:
        raise AccelerateError(str(error)) from None
    chosen, source, minimum = _choose_plan(plan, first)
    for name, transformer in transformers.items():
        for site in wan.sites(transformer):
            if not is_bridgeable(site.attention):
                raise AccelerateError(
                    f"{name}.{site.name} has the processor {type(site.attention.processor).__name__}, which does not "
                    "ask Diffusers' dispatcher; put the model's own processor back first"
                )
    return Handle(pipe, transformers, chosen, source, minimum, backend_name, backend_reason)


class Handle:
    """An accelerated pipeline: what it did, and the way back."""

    def __init__(
        self,
        pipe: Any,
        transformers: dict[str, Any],
        plan: Plan | None,
        plan_source: str,
        minimum_tokens: int,
        backend: str,
        backend_reason: str,
    ) -> None:
        self.plan, self.plan_source = plan, plan_source
        self.backend, self.backend_reason = backend, backend_reason
        self._transformers = transformers
        self._run = RunState(pipe, transformers)
        self._runtime = Runtime(plan, minimum_tokens, backend, self._run)
        self._bridges = []
        for transformer in transformers.values():
            self._bridges.append(
                Bridge(
                    [
                        (s.block, s.attention, SiteAttention(s.name, i, backend_before(s.attention), self._runtime))
                        for i, s in enumerate(wan.sites(transformer))
                    ]
                )
            )
            setattr(transformer, conflicts.MARK, True)
        self._run.install(wan.token_grid)

    def report(self) -> Report:
        """What the latest generation did."""
        name = self.plan.name if self.plan else "none"
        return make_report(self._runtime, name, self.plan_source, self.backend, self.backend_reason)

    def restore(self) -> None:
        """Take everything out; the next output is bit-identical to that of a pipeline never touched."""
        self._run.remove()
        for bridge in self._bridges:
            bridge.remove()
        for transformer in self._transformers.values():
            vars(transformer).pop(conflicts.MARK, None)
        self._bridges, self._transformers = [], {}

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _choose_plan(plan: Plan | str | Path, transformer: Any) -> tuple[Plan | None, str, int]:
    """The plan, why this one, and the length below which it goes dense."""
    if isinstance(plan, Plan):
        return plan, "given", 0
    if plan == "none":
        return None, "asked for: dense attention, measured only", 0
    if plan != "auto":
        return Plan.load(plan), f"read from {plan}", 0
    fingerprint = wan.fingerprint(transformer)
    for shipped in shipped_plans():
        if shipped.model == fingerprint:
            return shipped, "the shipped plan for this model", wan.MINIMUM_TOKENS
    preset = Plan(
        (Choice("pooled", wan.PRESET_DENSITY, "pooled"),),
        Schedule(dense_above=wan.PRESET_DENSE_ABOVE),
        name="wan preset",
    )
    return preset, "no shipped plan fits this model: the preset of its family", wan.MINIMUM_TOKENS
