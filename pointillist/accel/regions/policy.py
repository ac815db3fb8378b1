"""`Regions`: what a plan or a user says about computing a part of the tokens. Its steps are the schedule's."""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

FOCUSES = ("change", "low_std", "high_std")
UNITS = ("token", "tile")
KEYS = ("full", "fp8", "input")
PREDICTORS = {"last": 1, "taylor": 2}
"""How many steps' keys and values are kept."""
EASY = {"region_from": 0.95, "region_to": 0.0, "region_every": 3}
"""Of the schedule, where only regions are asked for: two of three steps behind the first, noisy ones."""


class RegionsError(ValueError):
    """A policy that is not one: what was found, and what is allowed."""


@dataclass(frozen=True)
class Regions:
    """How many tokens a region step computes, and which."""

    share: float = 0.3
    """Of the tokens."""
    focus: str = "change"
    """Which tokens matter: those whose velocity changed most when they were last computed (`change`), or whose velocity
    has the least or the greatest standard deviation over channels (RAS)."""
    unit: str = "token"
    """`tile`: whole blocks of a plan's order `frames` are chosen, so that sparse patterns in this order stay sparse."""
    age: float = 0.1
    """A token's importance grows by exp(age) with every step since it was last computed."""
    max_age: int = 8
    """After so many steps a token is computed, whatever its importance."""
    keys: str = "full"
    """How keys and values of the other tokens are kept: as they are, in 8 bits (`fp8`), or as what they are computed
    from (`input`), in every region step anew. Each of the latter two halves what is kept in bfloat16."""
    predictor: str = "taylor"
    """What stands in for keys and values of tokens that are not computed: those of the last step that computed all
    tokens (`last`), or the line through its and those of the one before (`taylor`), which takes twice the memory."""
    layers: float = 1.0
    """This share of the layers keeps them; in the others, evenly between, the chosen tokens see but each other."""

    def __post_init__(self) -> None:
        for name, allowed in (("focus", FOCUSES), ("unit", UNITS), ("keys", KEYS), ("predictor", PREDICTORS)):
            if getattr(self, name) not in allowed:
                raise RegionsError(f"{name} is {getattr(self, name)!r:.80}; allowed are {', '.join(allowed)}")
        for name in ("share", "layers"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value <= 1:
                raise RegionsError(f"{name} is {value!r:.80}; it must be a number above 0 and at most 1")
        if not _is_number(self.age) or not 0 <= self.age <= 100:
            raise RegionsError(f"age is {self.age!r:.80}; it must be a number from 0 to 100")
        if isinstance(self.max_age, bool) or not isinstance(self.max_age, int) or not 1 <= self.max_age <= 1000:
            raise RegionsError(f"max_age is {self.max_age!r:.80}; it must be a whole number from 1 to 1000")
        if self.max_age * self.share < 1:
            raise RegionsError(
                f"a share of {self.share:g} reaches all tokens in {1 / self.share:.0f} steps, which is more than "
                f"max_age {self.max_age}; raise one of them"
            )

    @property
    def kept_steps(self) -> int:
        """Keys and values of so many steps are kept."""
        return PREDICTORS[self.predictor]

    def keeps(self, layers: int) -> tuple[str, ...]:
        """How each of so many layers keeps keys and values: as `keys` says, or `none`."""
        counts = [math.floor(layer * self.layers + 1e-9) for layer in range(layers + 1)]
        return tuple(self.keys if more > less else "none" for less, more in pairwise(counts))

    @classmethod
    def parse(cls, text: str) -> "tuple[Regions, dict[str, Any]]":
        """From `easy` or `FOCUS`, with `:NAME=VALUE,…`: the policy, and the fields of the schedule (`from`, `to`,
        `every`) that go with it.

        Raises:
            RegionsError: what is not allowed.
        """
        name, _, rest = text.partition(":")
        if name != "easy" and name not in FOCUSES:
            raise RegionsError(f"regions {name!r:.80} are unknown; allowed are auto, none, easy, {', '.join(FOCUSES)}")
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, Any] = {} if name == "easy" else {"focus": name}
        schedule: dict[str, Any] = dict(EASY)
        for part in filter(None, rest.split(",")):
            key, equals, value = (each.strip() for each in part.partition("="))
            try:
                if key in ("from", "to", "every"):
                    schedule[f"region_{key}"] = int(value) if key == "every" else float(value)
                elif equals and key in kinds:
                    values[key] = kinds[key](value)
                else:
                    allowed = ", ".join([*kinds, "from", "to", "every"])
                    raise RegionsError(f"region option {part!r:.80} is none; give NAME=VALUE with one of {allowed}")
            except RegionsError:
                raise
            except ValueError as error:
                raise RegionsError(f"{key} is {value!r:.80}; it must be a number") from error
        return cls(**values), schedule

    def __str__(self) -> str:
        return f"{self.share:.0%} of the {self.unit}s by {self.focus}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
