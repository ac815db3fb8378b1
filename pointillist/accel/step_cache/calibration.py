"""`Calibration`: curves of one model, and `MadeWith`, what they hold for. Both are data.

`pointillist bench cache` writes a file of them (`search/cache_curves.py` records it); `magnitude:file=FILE` and
`modulated:file=FILE` take it. Another model's curve is refused; another sampler, number of steps, shift or attention is
told in every report.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pointillist.files import write_whole

SCHEMA = 1
MAX_STEPS, MAX_BYTES = 1000, 2**23
DEGREE = 4
"""Of polynomials."""


class CalibrationError(ValueError):
    """A calibration that is not one: what was found, and what is allowed."""


@dataclass(frozen=True)
class MadeWith:
    """What curves were recorded with. What is None is not known."""

    model: str | None = None
    """Fingerprints of the transformers, with + between two of them."""
    scheduler: str | None = None
    """Its class."""
    steps: int | None = None
    shift: float | None = None
    """Of the sigmas."""
    plan: str | None = None
    """Name of the attention plan; `none` is dense."""
    transformer: str | None = None
    """Class of the transformers, of shipped curves: their checkpoints' fingerprints are not known."""
    layers: int | None = None
    """And their `num_layers`."""

    def __post_init__(self) -> None:
        for name in ("model", "scheduler", "plan", "transformer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not 0 < len(value) <= 400):
                raise CalibrationError(f"{name} is {value!r:.80}; it must be a text of 1 to 400 letters, or null")
        for name in ("steps", "layers"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise CalibrationError(f"{name} is {value!r:.80}; it must be a whole number above 0, or null")
        if self.shift is not None and not (_is_number(self.shift) and 0 < self.shift < 1e6):
            raise CalibrationError(f"shift is {self.shift!r:.80}; it must be a number above 0, or null")

    @property
    def values(self) -> tuple[Any, ...]:
        """All fields in turn; `MadeWith(*values)` is the inverse."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def is_of(self, here: MadeWith, transformers: list[Any]) -> bool:
        """Whether the model here is the one it was made with, as far as that is known."""
        if self.model is not None and self.model != here.model:
            return False
        if self.transformer is not None and any(type(each).__name__ != self.transformer for each in transformers):
            return False
        return self.layers is None or all(each.config.get("num_layers") == self.layers for each in transformers)

    def doubts(self, here: MadeWith, what: str) -> tuple[str, ...]:
        """Sentences on what differs here but can be run; the attention plan is a rule of its own (`conflicts.py`)."""
        words = {"scheduler": "the scheduler", "steps": "this number of steps:", "shift": "the sigma shift"}
        differing = ((name, getattr(self, name), getattr(here, name)) for name in words)
        return tuple(
            f"{what} was calibrated with {words[name]} {made}; here it is {found}, so errors may be greater"
            for name, made, found in differing
            if made is not None and found is not None and made != found
        )


@dataclass(frozen=True)
class Calibration:
    """What was recorded of dense clips."""

    made_with: MadeWith
    curve: tuple[float, ...]
    """γ of every step, 1 for the first: see `magnitude.py`."""
    polynomial: tuple[float, ...] | None = None
    """Coefficients, highest degree first: see `modulated.py`. None where the model does not tell its modulation."""
    distances: tuple[tuple[float, float], ...] = ()
    """That the polynomial was fitted to: change of the modulation, change of the output, of every step and branch."""
    prompts: int = 1
    """So many clips were recorded."""
    spread: float = 0.0
    """The greatest difference of one clip's γ from the curve."""

    def __post_init__(self) -> None:
        check_curve(self.curve)
        if self.polynomial is not None:
            check_polynomial(self.polynomial)
        if not isinstance(self.distances, tuple) or len(self.distances) > 10**6:
            raise CalibrationError("distances must be a list of pairs")
        for pair in self.distances:
            if not isinstance(pair, tuple) or len(pair) != 2 or not all(_is_number(each) for each in pair):
                raise CalibrationError(f"distances hold {pair!r:.80}; each must be two numbers")
        if isinstance(self.prompts, bool) or not isinstance(self.prompts, int) or self.prompts < 1:
            raise CalibrationError(f"prompts is {self.prompts!r:.80}; it must be a whole number above 0")
        if not _is_number(self.spread) or self.spread < 0:
            raise CalibrationError(f"spread is {self.spread!r:.80}; it must be a number, 0 or more")
        if not isinstance(self.made_with, MadeWith):
            raise CalibrationError("made_with must say what the curve was recorded with")

    def options(self, decider: str) -> dict[str, Any]:
        """Of a decider, `magnitude` or `modulated`. Raises CalibrationError where it has none for it."""
        if decider == "magnitude":
            return {"curve": self.curve, "made_with": self.made_with.values}
        if decider != "modulated":
            raise CalibrationError(f"cache {decider} needs no calibration; magnitude and modulated do")
        if self.polynomial is None:
            raise CalibrationError(
                f"the calibration has no polynomial, as {self.made_with.model} does not tell what modulates its "
                "blocks; magnitude:file=… takes its curve"
            )
        return {"polynomial": self.polynomial, "made_with": self.made_with.values}

    def to_json(self) -> str:
        values = {"schema": SCHEMA, **asdict(self)}
        return json.dumps(values, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The inverse of `to_json`. Raises CalibrationError."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"a calibration is JSON, and this is not: {error!s:.80}") from error
        values = _only_fields(cls, values, "calibration", also=("schema",))
        if isinstance(values.get("schema"), bool) or values.pop("schema", None) != SCHEMA:
            raise CalibrationError(f"the calibration has another schema than {SCHEMA}, which this version reads")
        values["made_with"] = MadeWith(**_only_fields(MadeWith, values.get("made_with"), "made_with"))
        for name in ("curve", "polynomial", "distances"):
            if isinstance(values.get(name), list):
                values[name] = tuple(tuple(each) if isinstance(each, list) else each for each in values[name])
        if "curve" not in values:
            raise CalibrationError("the calibration is not complete: it has no curve")
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError."""
        write_whole(Path(path), (self.to_json() + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Raises CalibrationError for whatever is none."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise CalibrationError(f"it has more than {MAX_BYTES} bytes")
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, CalibrationError) as error:
            raise CalibrationError(
                f"{os.fspath(path)!r} cannot be read as a calibration: {error}; `pointillist bench cache` writes one"
            ) from error


def made_with(values: Any) -> MadeWith:
    """From the option of a decider. Raises CalibrationError."""
    if not isinstance(values, tuple) or len(values) > len(fields(MadeWith)):
        raise CalibrationError(f"made_with is {values!r:.80}; it must be the values of a MadeWith")
    return MadeWith(*values)


def check_curve(curve: Any) -> None:
    """Raises CalibrationError unless it has a number above 0 for every step."""
    if not isinstance(curve, tuple) or not 1 <= len(curve) <= MAX_STEPS:
        raise CalibrationError(f"curve must have a number for each step, 1 to {MAX_STEPS}")
    if not all(_is_number(each) and 0 < each < 1e3 for each in curve):
        raise CalibrationError("curve must hold numbers above 0")


def check_polynomial(polynomial: Any) -> None:
    """Raises CalibrationError unless it is coefficients."""
    if not isinstance(polynomial, tuple) or not polynomial or not all(_is_number(each) for each in polynomial):
        raise CalibrationError("polynomial must hold numbers, highest degree first")


def read_shipped(name: str) -> dict[str, tuple[tuple[float, ...], MadeWith]]:
    """Curves that come with the package, and what is known of how they were made, by the name of the model."""
    values = json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return {model: (tuple(each["values"]), MadeWith(**each["made_with"])) for model, each in values.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _only_fields(cls: type, values: Any, what: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    known = (*(field.name for field in fields(cls)), *also)
    if not isinstance(values, dict) or set(values) - set(known):
        raise CalibrationError(f"a {what} must be an object with the fields {', '.join(known)}")
    return dict(values)
