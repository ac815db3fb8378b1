"""From the argument `plan` to the plan that runs, and why."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pointillist.accel import plans
from pointillist.accel.conflicts import AccelerateError, Target
from pointillist.accel.plan import Plan, PlanError, Table
from pointillist.accel.regions.policy import EASY, Regions, RegionsError
from pointillist.accel.schedule import Schedule
from pointillist.accel.step_cache.policy import Caching, CachingError
from pointillist.accel.step_cache.table import CacheTable, CacheTableError, is_table, table_of

SPEEDS = ("quality", "balanced", "fast")
DENSITIES = {"quality": 0.35, "balanced": 0.2, "fast": 0.1}
"""At the speeds for which a model has no plan of their own."""


@dataclass(frozen=True)
class Choice:
    plan: Plan | None
    """None: every step is left to Diffusers' own attention."""
    source: str
    """Why this plan, in words."""
    caching: Caching | None = None
    """How steps are reused; the plan's schedule names none if this is none."""
    table: CacheTable | None = None
    """Which modules are reused, in place of steps."""


def choose_plan(wish: Plan | str | os.PathLike[str], targets: tuple[Target, ...]) -> Choice:
    """`auto` takes the shipped plan that fits the model, else the preset of its family.

    A speed in `SPEEDS` takes the shipped plan of this name; where none is shipped, what `auto` takes, at that speed's
    density.

    Raises:
        PlanError: the file at the path `wish` is not a plan.
        AccelerateError: the plan was made for another model.
    """
    if isinstance(wish, Plan):
        choice = Choice(wish, "given")
    elif wish == "none":
        choice = Choice(None, "asked for none: Diffusers' own attention, only measured")
    elif wish == "auto":
        choice = _automatic(targets, "balanced")
    elif isinstance(wish, str) and wish in SPEEDS:
        choice = _automatic(targets, wish)
    elif isinstance(wish, str | os.PathLike):
        choice = Choice(Plan.load(wish), f"from {os.fspath(wish)}")
    else:
        raise AccelerateError(
            f"plan is a {type(wish).__name__}; it must be a Plan, the path of one, or one of auto, none, "
            f"{', '.join(SPEEDS)}"
        )
    if choice.plan is not None:
        for target in targets:
            try:
                choice.plan.check_fits(*_shape(target))
            except PlanError as error:
                raise AccelerateError(f"{error}; give a plan made for it, or plan='auto'") from error
    return choice


def with_caching(choice: Choice, wish: Caching | CacheTable | str | None, targets: tuple[Target, ...]) -> Choice:
    """The choice with the cache that is wished for: `auto` is the plan's own.

    Raises:
        AccelerateError: the wish is none.
    """
    plan = choice.plan
    if wish == "auto":
        scheduled = plan is not None and bool(plan.schedule.computed)
        own = None if plan is None else plan.cache
        return replace(choice, caching=Caching("schedule", predictor="taylor") if scheduled and own is None else own)
    try:
        if isinstance(wish, str) and is_table(wish):
            wish = table_of(wish, _shape(targets[0])[0])
        caching = Caching.parse(wish) if isinstance(wish, str) and wish != "none" else wish
    except (CachingError, CacheTableError) as error:
        raise AccelerateError(str(error)) from error
    table = wish if isinstance(wish, CacheTable) else None
    if not isinstance(caching, Caching):
        caching = None
    if plan is not None and (caching is None or caching.decider != "schedule"):
        regions = plan.regions if plan.schedule.region_from else None
        plan = replace(plan, cache=caching, regions=regions, schedule=_all_computed(plan.schedule))
    if caching is not None and caching.decider == "schedule" and (plan is None or not plan.schedule.computed):
        raise AccelerateError("cache='schedule' follows a plan's schedule, and this plan's has no cached steps")
    return replace(choice, plan=plan, caching=caching, table=table)


def with_regions(choice: Choice, wish: Regions | str | None, cache: Any) -> Choice:
    """The choice with the regions that are wished for: `auto` is the plan's own.

    Others stand in place of steps that the plan reuses: around each of theirs whole steps would have to be computed.
    `cache` is what is wished for of caches: another than the plan's ends the plan's own region steps.

    Raises:
        AccelerateError: the wish is none.
    """
    plan = choice.plan
    if wish == "auto":
        return choice
    if wish in (None, "none"):
        if plan is None or plan.regions is None:
            return choice
        return replace(
            choice, plan=replace(plan, regions=None, schedule=replace(plan.schedule, region_from=0.0, region_after=()))
        )
    try:
        regions, steps = (wish, EASY) if isinstance(wish, Regions) else Regions.parse(str(wish))
        plan = Plan.uniform("dense", 1.0) if plan is None else plan
        own = plan.schedule.region_from or (plan.schedule.region_after and cache == "auto")
        if isinstance(wish, Regions) and own:
            steps = {}  # the plan's
        elif plan.schedule.computed:
            plan = replace(plan, cache=None, schedule=_all_computed(plan.schedule))
        return replace(choice, plan=replace(plan, regions=regions, schedule=replace(plan.schedule, **steps)))
    except (RegionsError, PlanError) as error:
        raise AccelerateError(str(error)) from error


def _all_computed(schedule: Schedule) -> Schedule:
    return replace(schedule, computed=(), region_after=())


def shipped_plans() -> list[Plan]:
    """The plans that come with the package, by file name."""
    return [Plan.load(path) for path in shipped_files()]


def shipped_files() -> list[Path]:
    """Their files."""
    folder = Path(plans.__file__).parent
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))


def _automatic(targets: tuple[Target, ...], speed: str) -> Choice:
    model = _shape(targets[0])[0]
    mine = [plan for plan in shipped_plans() if plan.model == model]
    for plan in mine:
        if plan.name.endswith(speed):
            return Choice(plan, f"shipped for this model ({model})")
    if mine:
        return Choice(_at_density(mine[0], DENSITIES[speed]), f"shipped for this model ({model}), at another density")
    preset = targets[0].family.preset(targets[0].transformer)
    return Choice(
        preset if speed == "balanced" else _at_density(preset, DENSITIES[speed]),
        f"no plan is shipped for this model ({model}); `pointillist search --model MODEL --output plan.safetensors` "
        "searches one",
    )


def _at_density(plan: Plan, density: float) -> Plan:
    """The same plan with another density wherever it is sparse."""

    def changed(table: Table) -> Table:
        return tuple(
            tuple(rule if rule.pattern == "dense" else replace(rule, density=density) for rule in row) for row in table
        )

    stages = tuple(replace(stage, table=changed(stage.table)) for stage in plan.stages)
    return replace(plan, name=f"{plan.name} at density {density:g}", table=changed(plan.table), stages=stages)


def _shape(target: Target) -> tuple[str, int, int]:
    """Fingerprint, layers and heads."""
    family, transformer = target.family, target.transformer
    return family.fingerprint(transformer), len(family.sites(transformer)), family.heads(transformer)
