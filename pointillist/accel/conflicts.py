"""Everything that is checked before anything is changed: single things by functions, what goes together by a table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pointillist.accel import bridge
from pointillist.accel.dense import check_dense
from pointillist.accel.models import family_of, supported
from pointillist.accel.models.family import Family
from pointillist.accel.models.other import Other, Sana
from pointillist.accel.parallel.split import config_of, degrees, why_no_ring
from pointillist.accel.plan import Plan
from pointillist.accel.step_cache.calibration import MadeWith
from pointillist.accel.step_cache.policy import Caching
from pointillist.accel.step_cache.table import CacheTable, shift_of
from pointillist.kernels import choose_backend

FEW_STEPS = 8
"""So few steps differ too much for one to serve another: distilled models."""


class AccelerateError(ValueError):
    """A pipeline or an argument that cannot be accelerated: what was given, what is allowed, what to do."""


@dataclass(frozen=True)
class Target:
    """A transformer to accelerate: its component name, and its family."""

    name: str
    transformer: Any
    family: Family


def targets_of(pipe: Any, sparse: bool = True) -> tuple[Target, ...]:
    """The transformers of `pipe`, all of them free of conflicts; with `sparse` they have an adapter for attention.

    Raises:
        AccelerateError: one is of an unsupported class, already accelerated, cached, compiled or parallel.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise AccelerateError(f"{type(pipe).__name__} is not a Diffusers pipeline: it has no components")
    found = {name: components.get(name) for name in ("transformer", "transformer_2")}
    targets = tuple(_target(name, module, sparse) for name, module in found.items() if module is not None)
    if not targets:
        raise AccelerateError(f"{type(pipe).__name__} has no transformer; supported are those of {supported()}")
    for method in ("set_timesteps", "step"):
        if not hasattr(components.get("scheduler"), method):
            raise AccelerateError(f"the scheduler of {type(pipe).__name__} has no {method}; the steps are read from it")
    return targets


@dataclass(frozen=True)
class Setup:
    """What is about to be installed."""

    pipe: Any
    targets: tuple[Target, ...]
    plan: Plan | None
    caching: Caching | None
    table: CacheTable | None = None

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    @property
    def sampler(self) -> str:
        return type(self.scheduler).__name__

    @property
    def regions(self) -> bool:
        """Whether some steps compute a part of the tokens."""
        return self.plan is not None and self.plan.regions is not None

    @property
    def ring(self) -> int:
        """So many processes hold keys for each other; 1 where each has all."""
        config = config_of(self.targets[0].transformer)
        return 1 if config is None else degrees(config)[1]

    @property
    def curve(self) -> MadeWith | None:
        """What the cache was calibrated with, if it was."""
        return None if self.caching is None else self.caching.made.calibrated

    def here(self, steps: int | None = None) -> MadeWith:
        """What a curve would have to be calibrated with."""
        sparse = self.plan is not None and self.plan.patterns != {"dense"}
        return MadeWith(
            model=model_of(self.targets),
            scheduler=self.sampler,
            steps=steps,
            shift=shift_of(self.scheduler),
            plan=_plan(self) if sparse else "none",
        )

    @property
    def reuses(self) -> bool:
        """Whether anything of one step serves another."""
        return self.regions or self.caching is not None or self.table is not None


@dataclass(frozen=True)
class Conflict:
    """A rule: what does not go together."""

    name: str
    verdict: str
    """`refuse`, before anything is changed; or `warn`, in every report."""
    found: Callable[[Setup], Any]
    """True where the rule applies."""
    sentence: Callable[[Setup], str]
    """What was given, and what to do."""


CONFLICTS = (
    Conflict(
        "regions of an unknown family", "refuse",
        lambda its: its.regions and not all(each.family.can_take_rows for each in its.targets),
        lambda its: f"regions are not known for {_classes(its)}; cache='easy' reuses whole steps of any model",
    ),
    Conflict(
        "an order from layer to layer of an unknown family", "refuse",
        lambda its: its.plan is not None and its.plan.hoist and not all(each.family.can_hoist for each in its.targets),
        lambda its: f"the plan {_plan(its)!r} puts tokens into another order before the first layer (hoist), which is "
        f"not known for {_classes(its)}; give a plan without hoist",
    ),
    Conflict(
        "a sampler with noise of its own", "refuse",
        lambda its: its.regions and _is_stochastic(its.scheduler),
        lambda its: f"the {its.sampler} adds noise of its own in every step, which tokens that are not computed would "
        "lack; regions need a deterministic one, like FlowMatchEulerDiscreteScheduler; or give regions='none'",
    ),
    Conflict(
        "a sampler with two evaluations in a step", "refuse",
        lambda its: its.reuses and getattr(its.scheduler, "order", 1) > 1,
        lambda its: f"the {its.sampler} evaluates the model twice in a step, and one would be taken for the other; "
        "caches and regions need a sampler of one evaluation",
    ),
    Conflict(
        "a cache and noise of the sampler", "warn",
        lambda its: (its.caching or its.table) is not None and _is_stochastic(its.scheduler),
        lambda its: f"the {its.sampler} adds noise of its own in every step, so steps differ and reusing them harms",
    ),
    Conflict(
        "regions and a sampler of several steps", "warn",
        lambda its: its.regions and _steps_of_sampler(its.scheduler) > 1,
        lambda its: f"the {its.sampler} mixes velocities of several steps, which are of several ages in regions; "
        "FlowMatchEulerDiscreteScheduler does not",
    ),
    Conflict(
        "keys made anew beside text", "refuse",
        lambda its: its.plan is not None and its.plan.regions is not None and its.plan.regions.keys == "input"
        and any(each.family.TEXT != "none" for each in its.targets),
        lambda its: f"keys='input' makes keys anew from the image's hidden states, but {_classes(its)} attends to text "
        "as well; take keys='fp8' or 'full'",
    ),
    Conflict(
        "a cache table with regions", "refuse",
        lambda its: its.regions and its.table is not None,
        lambda its: "regions compute a part of the tokens, and a cache table reuses what modules gave for all of them; "
        "take one away: regions='none', or another cache",
    ),
    Conflict(
        "a curve of another model", "refuse",
        lambda its: its.curve is not None
        and not its.curve.is_of(its.here(), [each.transformer for each in its.targets]),
        lambda its: f"the cache {its.caching} was calibrated for another model: {_model(its.curve)}, but here it is "
        f"{_model(its.here())}; calibrate one with `pointillist bench cache`, or take cache='easy'",
    ),
    Conflict(
        "a curve of another attention", "warn",
        lambda its: its.curve is not None and its.curve.plan not in (None, its.here().plan),
        lambda its: f"the cache {its.caching} was calibrated with the attention plan {its.curve.plan!r}; here it is "  # type: ignore[union-attr]
        f"{its.here().plan!r}, so errors may be greater",
    ),
    Conflict(
        "a plan that a ring cannot carry out", "refuse",
        lambda its: its.ring > 1 and why_no_ring(its.plan),
        lambda its: f"the plan {_plan(its)!r} cannot run in a ring of {its.ring} processes: {why_no_ring(its.plan)}",
    ),
    Conflict(
        "regions that make keys anew, over several processes", "refuse",
        lambda its: its.plan is not None and its.plan.regions is not None and its.plan.regions.keys == "input"
        and config_of(its.targets[0].transformer),
        lambda its: "regions with keys=input keep what goes into attention, of which each of several processes has a "
        "part; take keys=full or keys=fp8, which each keeps for its own heads",
    ),
    Conflict(
        "one transformer of two is split", "refuse",
        lambda its: len({config_of(each.transformer) is None for each in its.targets}) == 2,
        lambda its: f"one of {' and '.join(each.name for each in its.targets)} is split over processes and one is not; "
        "enable_parallelism on both",
    ),
    Conflict(
        "one transformer of two is missing", "refuse",
        lambda its: getattr(its.pipe.config, "boundary_ratio", None) is not None and len(its.targets) == 1,
        lambda its: f"{type(its.pipe).__name__} has a boundary_ratio for two transformers, but only "
        f"pipe.{its.targets[0].name} is there; load both",
    ),
)  # fmt: skip


def check_setup(setup: Setup) -> tuple[str, ...]:
    """The sentences of all warnings. Raises AccelerateError for the first rule that refuses."""
    applying = [rule for rule in CONFLICTS if rule.found(setup)]
    for rule in applying:
        if rule.verdict == "refuse":
            raise AccelerateError(rule.sentence(setup))
    return tuple(rule.sentence(setup) for rule in applying)


def doubts(setup: Setup, steps: int) -> tuple[str, ...]:
    """Sentences on what a cache was calibrated with that is not so in a generation of so many steps."""
    if setup.curve is None:
        return ()
    return setup.curve.doubts(setup.here(steps), f"the cache {setup.caching}")


def model_of(targets: tuple[Target, ...]) -> str:
    """Names the model: fingerprints of its transformers, each once."""
    return "+".join(dict.fromkeys(each.family.fingerprint(each.transformer) for each in targets))


def inert(setup: Setup, steps: int) -> str:
    """Why nothing will be reused in a generation of so many steps; "" if something may be."""
    caching = setup.caching
    if caching is None or caching.decider == "schedule":
        return ""
    if any(caching.may_reuse(step, steps, 0) for step in range(steps)) and steps > FEW_STEPS:
        return ""
    return (
        f"cache inert: of {steps} steps, the first {caching.first:.0%} and the last {caching.last} are computed, and "
        f"{FEW_STEPS} or fewer leave nothing to reuse"
    )


def _classes(setup: Setup) -> str:
    return ", ".join(type(each.transformer).__name__ for each in setup.targets)


def _model(made: MadeWith | None) -> str:
    if made is None or made.model is not None:
        return str(made and made.model)
    return f"a {made.transformer} of {made.layers} layers"


def _plan(setup: Setup) -> str:
    return "" if setup.plan is None else setup.plan.name


def _is_stochastic(scheduler: Any) -> bool:
    name, config = type(scheduler).__name__, scheduler.config
    words = ("Ancestral", "SDE", "DDPM", "LCM", "TCD")
    kinds = (str(config.get("algorithm_type", "")), str(config.get("solver_type", "")))
    noisy = bool(config.get("stochastic_sampling")) or any("sde" in kind for kind in kinds)
    return noisy or any(word in name for word in words)


def _steps_of_sampler(scheduler: Any) -> int:
    return int(scheduler.config.get("solver_order") or 1)


def check_arguments(pipe: Any, backend: str, dense: str) -> None:
    """Raises AccelerateError for values that this version cannot carry out."""
    try:
        device = torch.device(getattr(pipe, "_execution_device", pipe.device))  # they differ when offloading
        choose_backend(device, backend)
        check_dense(dense, device)
    except ValueError as error:
        raise AccelerateError(str(error)) from error


def _target(name: str, transformer: torch.nn.Module, sparse: bool) -> Target:
    described = f"pipe.{name} ({type(transformer).__name__})"
    if bridge.is_compiled(transformer):
        raise AccelerateError(f"{described} is compiled; call accelerate first and torch.compile after it")
    family = family_of(transformer)
    if family is None:
        raise AccelerateError(f"{described} is not supported; supported are {supported()}")
    if isinstance(family, Other) and sparse:
        why = family.WHY if isinstance(family, Sana) else f"supported are {supported()}; docs/models.md adds a family"
        raise AccelerateError(
            f"{described} is not supported by sparse attention: {why}; "
            "accelerate(pipe, plan='none', cache='easy') reuses steps of any model"
        )
    if bridge.foreign_cache(transformer):
        raise AccelerateError(f"{described} is cached by {bridge.foreign_cache(transformer)}; remove that first")
    sites = family.sites(transformer)
    if any(bridge.is_routed(attention) for _, attention in sites):
        raise AccelerateError(f"{described} is already accelerated; call restore() on the first handle")
    if any(bridge.is_compiled(block) for block, _ in sites):
        raise AccelerateError(f"{described} has compiled blocks; call accelerate first and compile after it")
    if caches := bridge.caching_hooks(transformer):
        raise AccelerateError(f"{described} has a Diffusers cache ({', '.join(caches)}); call disable_cache() on it")
    try:
        config_of(transformer)
    except ValueError as error:
        raise AccelerateError(f"{described}: {error}") from error
    for name_of_site, (_, attention) in zip(family.site_names(transformer), sites, strict=True):
        found = type(attention.processor).__name__
        if found not in family.PROCESSORS:
            raise AccelerateError(
                f"{described} has a {found} at {name_of_site}, which may call attention more than once (IP-Adapters "
                f"do); sparse attention knows {', '.join(family.PROCESSORS)}: set the model's own processor"
            )
        try:
            bridge.check_route(attention)
        except ValueError as error:
            raise AccelerateError(f"{described}, {name_of_site}: {error}") from error
    return Target(name, transformer, family)
