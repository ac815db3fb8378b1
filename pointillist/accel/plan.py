"""`Plan`: how every head of every layer computes attention; its file and its validation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from pointillist.accel.patterns import PATTERNS, pattern_class
from pointillist.accel.regions.policy import Regions, RegionsError
from pointillist.accel.schedule import Schedule
from pointillist.accel.step_cache.policy import Caching, CachingError
from pointillist.files import write_whole

SCHEMA = 1
TAILS = ("none", "pooled", "rectified", "rescaled")
QUANTIZED = ("none", "int8", "int8_fp8")
MAX_LAYERS = MAX_HEADS = 1024
MAX_STAGES = 64
MAX_STEPS = 1000


class PlanError(ValueError):
    """A plan that is not one: what was found, and what is allowed."""


Option = int | float | str | bool


@dataclass(frozen=True)
class Rule:
    """What one head does in sparse steps: a pattern at a density in (0, 1], and the pattern's options."""

    pattern: str
    density: float
    options: tuple[tuple[str, Option], ...] = ()
    """By name; those not named have the pattern's defaults."""

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise PlanError(f"pattern {self.pattern!r} is unknown; allowed are {', '.join(PATTERNS)}")
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise PlanError(f"density is {self.density!r}; it must be a number above 0 and at most 1")
        if self.options:
            _check_options(self.pattern, self.options)

    @property
    def kept(self) -> float:
        """The share of the pairs that the head computes; for `dense` and `skip` the density says nothing."""
        return {"dense": 1.0, "skip": 0.0}.get(self.pattern, self.density)

    def to_dict(self) -> dict[str, Any]:
        """As in a plan file."""
        options = {"options": dict(self.options)} if self.options else {}
        return {"pattern": self.pattern, "density": self.density, **options}

    @classmethod
    def from_dict(cls, values: Any) -> Rule:
        """The inverse of `to_dict`. Raises PlanError."""
        values = _only_fields(cls, values, "rule")
        options = values.get("options", {})
        if not isinstance(options, dict):
            raise PlanError(f"a rule's options are {options!r:.200}; they must be an object")
        return cls(**{**values, "options": tuple(sorted(options.items()))})


Table = tuple[tuple[Rule, ...], ...]
"""One row per layer, or one for all; in it one rule per head, or one for all."""


@dataclass(frozen=True)
class Stage:
    """A table of its own for late steps, or for one of a pipeline's transformers."""

    table: Table
    below: float = 1.0
    """It serves steps whose sigma is at most this share of the first one's, so that it carries to any step count."""
    transformer: str = ""
    """Component name of the transformer; "" is every one."""


@dataclass(frozen=True)
class Plan:
    """Patterns for every layer and head, the tail for what they drop, and the schedule of steps."""

    name: str
    table: Table
    """What heads do wherever no stage says otherwise."""
    stages: tuple[Stage, ...] = ()
    """Other tables for parts of a generation: the one with the least `below` serves, those of the transformer first."""
    tail: str = "none"
    """What stands in for dropped pairs: `none`, `pooled`, `rectified` or `rescaled` (see `tails.py`)."""
    residual: bool = False
    """Add what was lost at the last dense step, ever less of it (after Re-ttention). A site remembers as much as q for
    each branch, which large models have no room for."""
    schedule: Schedule = field(default_factory=Schedule)
    cache: Caching | None = None
    """Which steps reuse what earlier ones computed; none where the schedule caches none either."""
    regions: Regions | None = None
    """Which tokens the schedule's region steps compute."""
    block: int = 128
    """At most so many tokens are in a block."""
    quantized: str = "none"
    """`int8`, queries and keys of kept pairs in INT8, or `int8_fp8`, values in FP8 as well (PAROAttention; Sage)."""
    hoist: str = ""
    """An order of blocks (`blocks.BLOCK_ORDERS`) in which the tokens run through the whole transformer, so that
    attention of patterns in this order permutes nothing in the layers (Jenga). Dense calls then differ by rounding."""
    reuse_layers: int = 1
    """Patterns that look at q and k choose anew on every n-th layer; those between keep its choice (TidalDecode)."""
    reuse_steps: int = 1
    """Likewise for sparse steps: chosen anew on every n-th (SVOO, DFSAttn)."""
    dense_first_frame: bool = False
    """In a video, queries of the first latent frame see everything. A causal VAE encodes that frame by itself, and
    in the embedded model sparse attention gave it wrong colours."""
    min_tokens: int = 0
    """Shorter sequences run densely: there, selection costs more than it saves."""
    break_even: bool = True
    """Calls so dense that sparse attention would not be faster on this machine's backend run densely instead."""
    model: str = "any"
    """Fingerprint of the transformer that the plan was made for."""
    grid: tuple[int, int, int] | None = None
    """The token grid that it was made for; it carries over to others."""
    hardware: str | None = None
    predicted: dict[str, float] = field(default_factory=dict)
    """Cost and error as predicted, and as measured, by name."""
    measured: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def uniform(
        cls,
        pattern: str,
        density: float,
        *,
        tail: str = "default",
        dense_steps: int = 0,
        block: int = 128,
        **options: Option,
    ) -> Plan:
        """The same pattern and density in every head of every model, at any length: exactly that.

        Args:
            tail: `none`, `pooled`, `rectified`, `rescaled`, or `default`: what the pattern is best with.
            dense_steps: so many first steps are dense.
            options: of the pattern, for example order="gilbert".

        Raises:
            PlanError: a value that is not allowed.
        """
        rule = Rule(pattern, 1.0 if pattern == "dense" else density, tuple(sorted(options.items())))
        if tail == "default":
            tail = pattern_class(pattern).TAIL
        steps = f", {dense_steps} dense steps" if dense_steps else ""
        return cls(
            name="uniform dense" if pattern == "dense" else f"uniform {pattern} at {density:g}, tail {tail}{steps}",
            table=((rule,),),
            tail=tail,
            schedule=Schedule(dense_steps=dense_steps),
            block=block,
            break_even=False,
        )

    @property
    def tables(self) -> tuple[Table, ...]:
        """Every table: that of the plan and those of its stages."""
        return self.table, *(stage.table for stage in self.stages)

    @property
    def patterns(self) -> set[str]:
        """The names of all patterns in it."""
        return {rule.pattern for table in self.tables for row in table for rule in row}

    def rules(self, layer: int, share: float = 1.0, transformer: str = "") -> tuple[Rule, ...]:
        """The rules of a layer: one for all heads, or one for each.

        Args:
            share: the running step's sigma over that of the first step.
            transformer: its component name.
        """
        serving = (each for each in self.stages if share <= each.below and each.transformer in ("", transformer))
        best = min(serving, key=lambda stage: (stage.transformer == "", stage.below), default=None)
        table = self.table if best is None else best.table
        return table[0] if len(table) == 1 else table[layer]

    def carried(self, rules: tuple[Rule, ...], tokens: int) -> tuple[Rule, ...]:
        """The rules of this plan for a sequence of another length than it was made for.

        Heads keep their shares of a longer one. Of a shorter one a query sees no fewer keys than it did: a span of
        a + b·N as of MoA, with the larger of LServe's constant number (a) and a constant share (b).
        """
        made_for = tokens if self.grid is None else math.prod(self.grid)
        return rules if tokens >= made_for else _denser(rules, made_for / tokens)

    def check_fits(self, model: str, layers: int, heads: int) -> None:
        """Raises PlanError if the plan was made for another model than this one."""
        if self.model not in ("any", model):
            raise PlanError(f"the plan {self.name!r} was made for the model {self.model}; this one is {model}")
        for table in self.tables:
            if len(table) not in (1, layers):
                raise PlanError(f"the plan {self.name!r} has {len(table)} layers; the model has {layers}")
            if any(len(row) not in (1, heads) for row in table):
                raise PlanError(
                    f"the plan {self.name!r} has rows whose length is neither 1 nor {heads}, the model's heads"
                )

    def to_json(self) -> str:
        """The plan as a JSON object, the inverse of `from_json`."""
        stages = [{**asdict(stage), "table": _table_to_lists(stage.table)} for stage in self.stages]
        values = {"schema": SCHEMA, **asdict(self), "table": _table_to_lists(self.table), "stages": stages}
        if self.cache is not None:
            values["cache"]["options"] = dict(self.cache.options)
        return json.dumps(values, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises PlanError unless `text` is a valid plan in every value."""
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise PlanError(f"the plan is a JSON {type(values).__name__}; it must be an object")
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            newer = _is_count(schema) and schema > SCHEMA
            what = "is newer than this version of pointillist; upgrade it" if newer else "is unknown"
            raise PlanError(f"the plan's schema {schema!r:.80} {what}; this version reads schema {SCHEMA}")
        values = _only_fields(cls, values, "plan")
        try:
            stages = tuple(_stage_from(stage) for stage in values.get("stages", ()))
            table = _table_from_lists(values["table"])
            schedule = _schedule_from(values.get("schedule", {}))
            cache = None if values.get("cache") is None else _caching_from(values["cache"])
            if values.get("regions") is not None:
                values["regions"] = Regions(**_only_fields(Regions, values["regions"], "region policy"))
            grid = values.get("grid")
            grid = None if grid is None else tuple(grid)
            return cls(
                **{**values, "table": table, "stages": stages, "schedule": schedule, "cache": cache, "grid": grid}
            )
        except (CachingError, RegionsError) as error:
            raise PlanError(str(error)) from error
        except (TypeError, KeyError) as error:
            raise PlanError(f"the plan lacks a value or has one of the wrong kind: {error}") from error

    def save(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a plan file, whole or not at all. Raises OSError.

        `tensors` (NumPy arrays) and `metadata` are what else the file holds: how a search found the plan.
        """
        data = to_safetensors(dict(tensors or {}), metadata={**(metadata or {}), "pointillist.plan": self.to_json()})
        write_whole(Path(path), data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file, or the JSON that ships; nothing is executed. Raises PlanError for what is not a plan."""
        try:
            if os.fspath(path).endswith(".json"):
                return cls.from_json(Path(path).read_text(encoding="utf-8"))
            with safe_open(os.fspath(path), framework="np") as file:
                metadata = file.metadata() or {}
        except PlanError:
            raise
        except FileNotFoundError:
            raise PlanError(
                f"there is no plan {os.fspath(path)!r}; give a plan file, or auto, quality, balanced, fast or none"
            ) from None
        except (SafetensorError, ValueError) as error:
            raise PlanError(f"{os.fspath(path)!r} is no plan file: {error}") from error
        except OSError as error:
            raise PlanError(f"the plan {os.fspath(path)!r} cannot be read: {error.strerror or error}") from error
        if "pointillist.plan" not in metadata:
            raise PlanError(f"{os.fspath(path)} is a safetensors file without a plan in its metadata")
        return cls.from_json(metadata["pointillist.plan"])


@lru_cache(maxsize=4096)
def _denser(rules: tuple[Rule, ...], times: float) -> tuple[Rule, ...]:
    return tuple(replace(rule, density=min(1.0, rule.density * times)) for rule in rules)


def _check(plan: Plan) -> None:
    """Raises PlanError for the first value of `plan` that is not allowed."""
    if plan.tail not in TAILS:
        raise PlanError(f"tail {plan.tail!r} is unknown; allowed are {', '.join(TAILS)}")
    if plan.quantized not in QUANTIZED:
        raise PlanError(f"quantized is {plan.quantized!r}; allowed are {', '.join(QUANTIZED)}")
    if not isinstance(plan.hoist, str):
        raise PlanError(f"hoist is {plan.hoist!r:.200}; it must be the name of an order, or nothing")
    if plan.hoist:
        _check_hoist(plan)
    if plan.residual is True or plan.tail == "rescaled":
        _check_adds(plan, "residual must be false and the tail another")
    for name in ("reuse_layers", "reuse_steps"):
        if not _is_count(getattr(plan, name)) or getattr(plan, name) < 1:
            raise PlanError(f"{name} is {getattr(plan, name)!r}; it must be a whole number, 1 or more")
    if not all(isinstance(text, str) for text in (plan.name, plan.model)):
        raise PlanError(f"name {plan.name!r} and model {plan.model!r} must be text")
    if plan.hardware is not None and not isinstance(plan.hardware, str):
        raise PlanError(f"hardware is {plan.hardware!r}; it must be text or absent")
    for table in plan.tables:
        if not 1 <= len(table) <= MAX_LAYERS or not all(1 <= len(row) <= MAX_HEADS for row in table):
            raise PlanError(f"a table must have 1 to {MAX_LAYERS} rows of 1 to {MAX_HEADS} rules")
    _check_stages(plan.stages)
    if not _is_count(plan.block) or not 1 <= plan.block <= 4096:
        raise PlanError(f"block is {plan.block!r}; it must be a whole number from 1 to 4096")
    for name in ("dense_first_frame", "break_even", "residual"):
        if not isinstance(getattr(plan, name), bool):
            raise PlanError(f"{name} is {getattr(plan, name)!r}; it must be true or false")
    if not _is_count(plan.min_tokens):
        raise PlanError(f"min_tokens is {plan.min_tokens!r}; it must be a whole number, 0 or more")
    if plan.grid is not None and not (len(plan.grid) == 3 and all(_is_count(n) and n > 0 for n in plan.grid)):
        raise PlanError(f"grid is {plan.grid!r}; it must be three whole numbers (T, H, W), each at least 1")
    _check_schedule(plan.schedule)
    if plan.cache is not None and not isinstance(plan.cache, Caching):
        raise PlanError(f"cache is {plan.cache!r:.200}; it must be a Caching, or nothing")
    if plan.regions is not None and not isinstance(plan.regions, Regions):
        raise PlanError(f"regions is {plan.regions!r:.200}; it must be a Regions, or nothing")
    if plan.regions is not None and plan.hoist:
        raise PlanError("regions take tokens in the order of the grid, so hoist must be empty")
    if (plan.schedule.region_from or plan.schedule.region_after) and plan.regions is None:
        raise PlanError("the schedule has region steps; regions must say which tokens they compute")
    if plan.schedule.computed and plan.cache is not None and plan.cache.decider != "schedule":
        raise PlanError(f"the schedule says which steps are cached, and so does the cache {plan.cache}; take one away")
    for figures in (plan.predicted, plan.measured):
        if not isinstance(figures, dict) or not all(_is_number(value) for value in figures.values()):
            raise PlanError(f"predicted and measured must be objects of numbers; one is {figures!r}")


def _check_schedule(schedule: Schedule) -> None:
    for name in ("dense_steps", "dense_every", "region_every"):
        if not _is_count(getattr(schedule, name)):
            raise PlanError(f"{name} is {getattr(schedule, name)!r}; it must be a whole number, 0 or more")
    if schedule.region_every < 1:
        raise PlanError("region_every is 0; it must be 1 or more")
    for name in ("dense_above", "region_from", "region_to"):
        value = getattr(schedule, name)
        if not _is_number(value) or not 0 <= value <= 1:
            raise PlanError(f"{name} is {value!r}; it must be a number from 0 to 1")
    for name in ("computed", "region_after"):
        points = getattr(schedule, name)
        if not isinstance(points, tuple) or len(points) > MAX_STEPS:
            raise PlanError(f"{name} is {points!r:.200}; it must hold at most {MAX_STEPS} numbers")
        if not all(_is_number(point) and 0 <= point <= 1 for point in points):
            raise PlanError(f"{name} is {points!r:.200}; it must hold numbers from 0 to 1")
    if not set(schedule.region_after) <= set(schedule.computed):
        raise PlanError(f"region_after is {schedule.region_after}; it must hold numbers of computed")


def _check_stages(stages: tuple[Stage, ...]) -> None:
    if len(stages) > MAX_STAGES:
        raise PlanError(f"there are {len(stages)} stages; allowed are up to {MAX_STAGES}")
    for stage in stages:
        if not _is_number(stage.below) or not 0 <= stage.below <= 1:
            raise PlanError(f"a stage's below is {stage.below!r}; it must be a number from 0 to 1")
        if not isinstance(stage.transformer, str):
            raise PlanError(f"a stage's transformer is {stage.transformer!r:.200}; it must be text")


def _check_hoist(plan: Plan) -> None:
    """Raises PlanError for an order that is none, or patterns that work on tokens as they lie."""
    from pointillist.accel.blocks import BLOCK_ORDERS

    if plan.hoist not in BLOCK_ORDERS:
        raise PlanError(f"hoist is {plan.hoist!r:.200}; allowed are {', '.join(BLOCK_ORDERS)}, or nothing")
    _check_adds(plan, "hoist must be empty")


def _check_adds(plan: Plan, demand: str) -> None:
    """Raises PlanError if a pattern adds a part of its own to the output."""
    for name in sorted(plan.patterns):
        if pattern_class(name).ADDS:
            raise PlanError(f"the pattern {name} adds a trained part to the output of the grid's tokens; {demand}")


def _check_options(pattern: str, options: Any) -> None:
    """Raises PlanError unless the pattern has these options and allows their values."""
    is_table = isinstance(options, tuple) and all(isinstance(each, tuple) and len(each) == 2 for each in options)
    if not is_table or not all(isinstance(name, str) for name, _ in options):
        raise PlanError(f"options are {options!r:.200}; they must be pairs of a name and a value")
    for name, value in options:
        if not isinstance(value, str) and not isinstance(value, bool) and not _is_number(value):
            raise PlanError(f"the option {name} is {value!r:.200}; it must be a number, text, true or false")
    try:
        pattern_class(pattern).check_values(dict(options))
    except (TypeError, ValueError) as error:
        raise PlanError(str(error)) from error


def _schedule_from(values: Any) -> Schedule:
    values = _only_fields(Schedule, values, "schedule")
    points = {name: tuple(values.get(name, ())) for name in ("computed", "region_after")}
    return Schedule(**{**values, **points})


def _caching_from(values: Any) -> Caching:
    values = _only_fields(Caching, values, "cache")
    options = values.get("options", {})
    if not isinstance(options, dict) or len(options) > 16:
        raise PlanError(f"a cache's options are {options!r:.200}; they must be an object")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return Caching(**{**values, "options": tuple(sorted(options.items()))})


def _stage_from(values: Any) -> Stage:
    values = _only_fields(Stage, values, "stage")
    return Stage(**{**values, "table": _table_from_lists(values["table"])})


def _table_to_lists(table: Table) -> list[list[dict[str, Any]]]:
    return [[rule.to_dict() for rule in row] for row in table]


def _table_from_lists(rows: Any) -> Table:
    return tuple(tuple(Rule.from_dict(rule) for rule in row) for row in rows)


def _only_fields(cls: type, values: Any, what: str) -> dict[str, Any]:
    known = cls.__dataclass_fields__  # type: ignore[attr-defined]
    if not isinstance(values, dict) or set(values) - set(known):
        raise PlanError(f"a {what} must be an object with no other keys than {', '.join(known)}; found {values!r:.200}")
    return dict(values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
