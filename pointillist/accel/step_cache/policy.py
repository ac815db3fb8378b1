"""`Caching`: what a plan or a user says about reusing steps."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pointillist.accel.step_cache.calibration import Calibration, CalibrationError
from pointillist.accel.step_cache.decider import Decider
from pointillist.accel.step_cache.first_block import FirstBlock
from pointillist.accel.step_cache.magnitude import Magnitude
from pointillist.accel.step_cache.modulated import Modulated
from pointillist.accel.step_cache.predictors import PREDICTORS
from pointillist.accel.step_cache.rate import Rate
from pointillist.accel.step_cache.scheduled import Scheduled

DECIDERS: dict[str, type[Decider]] = {each.NAME: each for each in (Rate, FirstBlock, Magnitude, Modulated, Scheduled)}
LEVELS = ("auto", "stack", "output")


class CachingError(ValueError):
    """A policy that is not one: what was found, and what is allowed."""


@dataclass(frozen=True)
class Caching:
    """Who decides, what stands in, and which steps are computed in any case."""

    decider: str = "rate"
    options: tuple[tuple[str, Any], ...] = ()
    """Of the decider, by name."""
    predictor: str = "last"
    level: str = "auto"
    """What is reused: what all blocks added to the hidden states (`stack`), or to the latents (`output`); `auto` is the
    stack where the blocks are known."""
    first: float = 0.2
    """This share of the steps is computed first."""
    last: int = 1
    """And so many at the end."""
    most: int = 4
    """At most so many steps in a row are reused. A schedule says by itself which steps are, so these three do not
    concern it."""

    def __post_init__(self) -> None:
        if self.decider not in DECIDERS:
            raise CachingError(
                f"the cache {self.decider!r:.80} is unknown; allowed are auto, none, easy, table, {', '.join(DECIDERS)}"
            )
        if self.predictor not in PREDICTORS:
            raise CachingError(f"predictor {self.predictor!r:.80} is unknown; allowed are {', '.join(PREDICTORS)}")
        if self.level not in LEVELS:
            raise CachingError(f"level {self.level!r:.80} is unknown; allowed are {', '.join(LEVELS)}")
        if isinstance(self.first, bool) or not isinstance(self.first, int | float) or not 0 <= self.first <= 1:
            raise CachingError(f"first is {self.first!r:.80}; it must be a share from 0 to 1")
        for name in ("last", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1000:
                raise CachingError(f"{name} is {value!r:.80}; it must be a whole number from 0 to 1000")
        try:
            made = DECIDERS[self.decider].make(**dict(self.options))
        except (TypeError, ValueError) as error:
            raise CachingError(f"cache {self.decider}: {error}") from error
        if self.level == "output" and made.blocks_before:
            raise CachingError(f"{self.decider} runs blocks before it decides, so the level cannot be output")

    @cached_property
    def made(self) -> Decider:
        """The decider."""
        return DECIDERS[self.decider].make(**dict(self.options))

    def may_reuse(self, step: int, steps: int, in_a_row: int) -> bool:
        """Whether the decider has a say at this step, after so many reused ones."""
        if self.decider == Scheduled.NAME:
            return True
        return math.ceil(self.first * steps) <= step < steps - self.last and in_a_row < self.most

    @classmethod
    def parse(cls, text: str) -> "Caching":
        """From `easy`, or `DECIDER:NAME=VALUE,NAME=VALUE`, with options of the decider and of this class. `file=FILE`
        gives a decider the curve of a calibration.

        Raises:
            CachingError: what is not allowed.
        """
        name, _, rest = text.partition(":")
        values: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise CachingError(f"cache option {part!r:.80} must be NAME=VALUE")
            values[key.strip()] = _value(value.strip())
        mine = {key: values.pop(key) for key in ("predictor", "level", "first", "last", "most") if key in values}
        if "file" in values:
            try:
                values |= Calibration.load(str(values.pop("file"))).options(name)
            except CalibrationError as error:
                raise CachingError(f"cache {name}: {error}") from error
        return cls("rate" if name == "easy" else name, tuple(sorted(values.items())), **mine)

    def __str__(self) -> str:
        shown = [f"{name}={value}" for name, value in self.options if not isinstance(value, tuple)]
        if self.predictor != "last":
            shown.append(f"predictor={self.predictor}")
        return self.decider + (f" ({', '.join(shown)})" if shown else "")


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
