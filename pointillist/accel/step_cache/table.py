"""`CacheTable`: for every step, layer and module (self-attention, feed-forward), compute or reuse. It is data.

Where the table says reuse, the module's last computed output stands in, as it was before the adaLN gate: gate and
residual are the running step's. Tables are learned (HarmoniCa, arXiv 2410.01723: `pointillist search --cache-table`) or
written down: `every` is FORA (arXiv 2407.01425), `intervals` is like Pyramid Attention Broadcast (arXiv 2408.12588).
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pointillist.accel.step_cache.predictors import PREDICTORS
from pointillist.files import write_whole

SCHEMA = 1
KINDS = ("attention", "mlp")
MAX_STEPS, MAX_LAYERS = 1000, 1024
MAX_BYTES = 2**23
FOLDER = Path(__file__).parent / "tables"
"""Of the shipped tables."""


class CacheTableError(ValueError):
    """A table that is not one, or is of something else: what was found, and what is allowed."""


@dataclass(frozen=True)
class MadeFor:
    """What a table was learned with. What is None is not known."""

    model: str
    """Fingerprint of the transformer."""
    scheduler: str
    """Its class."""
    shift: float | None = None
    """Of its sigmas."""
    guided: bool | None = None
    plan: str = "none"
    """Name of the attention plan."""

    def __post_init__(self) -> None:
        for name in ("model", "scheduler", "plan"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 0 < len(value) <= 200:
                raise CacheTableError(f"{name} is {value!r:.80}; it must be a text of 1 to 200 letters")
        if self.shift is not None and (
            isinstance(self.shift, bool) or not isinstance(self.shift, int | float) or not 0 < self.shift < 1e6
        ):
            raise CacheTableError(f"shift is {self.shift!r:.80}; it must be a number above 0, or null")
        if self.guided is not None and not isinstance(self.guided, bool):
            raise CacheTableError(f"guided is {self.guided!r:.80}; it must be true, false or null")


@dataclass(frozen=True)
class CacheTable:
    """Which modules are computed in which steps."""

    attention: tuple[str, ...]
    """A row of 0 (reuse) and 1 (compute) for each step, noisiest first; a digit for each layer."""
    mlp: tuple[str, ...]
    """The same for the feed-forward networks."""
    made_for: MadeFor | None = None
    """None fits whatever has as many steps and layers."""
    predictor: str = "last"
    """What stands in for a module that is not computed, of its last computed outputs: see `predictors.py`."""
    name: str = "table"

    def __post_init__(self) -> None:
        for kind in KINDS:
            _check_rows(kind, getattr(self, kind))
        if len(self.attention) != len(self.mlp) or len(self.attention[0]) != len(self.mlp[0]):
            raise CacheTableError("attention and mlp must have as many steps and as many layers")
        if "0" in self.attention[0] + self.mlp[0]:
            raise CacheTableError("the first step must be computed: there is nothing to reuse yet")
        if not isinstance(self.predictor, str) or self.predictor not in PREDICTORS:
            raise CacheTableError(f"predictor {self.predictor!r:.80} is unknown; allowed are {', '.join(PREDICTORS)}")
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 200 or not self.name.isprintable():
            raise CacheTableError(f"name is {self.name!r:.80}; it must be a text of 1 to 200 letters")

    @property
    def steps(self) -> int:
        return len(self.attention)

    @property
    def layers(self) -> int:
        return len(self.attention[0])

    @property
    def share(self) -> float:
        """Of all modules in all steps, so many are reused."""
        reused = sum(row.count("0") for row in self.attention + self.mlp)
        return reused / (2 * self.steps * self.layers)

    def computes(self, step: int, layer: int, kind: str) -> bool:
        """Whether a module, one of `KINDS`, is to be computed."""
        rows: tuple[str, ...] = getattr(self, kind)
        return rows[step][layer] == "1"

    def check_fits(self, here: MadeFor, layers: int, steps: int | None = None) -> None:
        """Raises CacheTableError for another model, scheduler, or number of layers or steps (None: not yet known)."""
        pairs = [("layers", self.layers, layers)]
        if self.made_for is not None:
            pairs += [("model", self.made_for.model, here.model)]  # type: ignore[list-item]
            pairs += [("scheduler", self.made_for.scheduler, here.scheduler)]  # type: ignore[list-item]
        if steps is not None:
            pairs += [("number of steps", self.steps, steps)]
        for what, made_for, found in pairs:
            if made_for != found:
                raise CacheTableError(
                    f"the cache table {self.name!r} is for another {what}: {made_for}, but here it is {found}; "
                    "learn one for it with `pointillist search --cache-table`, or leave it out"
                )

    def doubts(self, here: MadeFor) -> tuple[str, ...]:
        """Sentences on what differs from what it was learned with, but can be run."""
        if self.made_for is None:
            return ()
        words = {"shift": "sigma shift", "guided": "guidance", "plan": "attention plan"}
        differing = ((name, getattr(self.made_for, name), getattr(here, name)) for name in words)
        return tuple(
            f"the cache table {self.name!r} was learned with the {words[name]} {_text(learned)}; "
            f"here it is {_text(found)}, so errors may be greater"
            for name, learned, found in differing
            if learned is not None and found is not None and learned != found
        )

    @classmethod
    def every(cls, steps: int, layers: int, interval: int) -> "CacheTable":
        """FORA: all modules in every `interval`-th step."""
        return cls.intervals(steps, layers, interval, interval)

    @classmethod
    def intervals(
        cls, steps: int, layers: int, attention: int = 1, mlp: int = 1, first: int = 0, last: int = 0
    ) -> "CacheTable":
        """An interval for each kind of module; the `first` and the `last` steps are computed whole (like PAB)."""
        values = {"steps": steps, "layers": layers, "attention": attention, "mlp": mlp}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CacheTableError(f"{name} is {value!r:.80}; it must be a whole number, 1 or more")

        def rows(interval: int) -> tuple[str, ...]:
            whole = (step < first or step >= steps - last or step % interval == 0 for step in range(steps))
            return tuple(("1" if each else "0") * layers for each in whole)

        name = f"every {attention}" if attention == mlp else f"attention every {attention}, mlp every {mlp}"
        return cls(rows(attention), rows(mlp), name=name)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "CacheTable":
        """The inverse of `to_json`. Raises CacheTableError."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CacheTableError(f"a cache table is JSON, and this is not: {error!s:.80}") from error
        values = _only_fields(cls, values, "cache table", also=("schema",))
        if isinstance(values.get("schema"), bool) or values.pop("schema", None) != SCHEMA:
            raise CacheTableError(f"the cache table has another schema than {SCHEMA}, which this version reads")
        if values.get("made_for") is not None:
            values["made_for"] = _made(MadeFor, _only_fields(MadeFor, values["made_for"], "made_for"))
        for kind in KINDS:
            if not isinstance(values.get(kind), list):
                raise CacheTableError(f"{kind} must be a list with a text of 0 and 1 for each step")
            values[kind] = tuple(values[kind])
        return _made(cls, values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError."""
        write_whole(Path(path), (self.to_json() + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CacheTable":
        """Raises CacheTableError for whatever is no table."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise CacheTableError(f"{path} is no cache table: it has more than {MAX_BYTES} bytes")
            return cls.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CacheTableError(
                f"{os.fspath(path)!r} cannot be read as a cache table: there is no such file"
            ) from None
        except (OSError, UnicodeDecodeError, CacheTableError) as error:
            raise CacheTableError(f"{os.fspath(path)!r} cannot be read as a cache table: {error}") from error

    @classmethod
    def shipped(cls, model: str) -> "CacheTable":
        """The one that comes with the package for a model, by its fingerprint. Raises CacheTableError if none does."""
        tables = [cls.load(path) for path in sorted(FOLDER.glob("*.json"))]
        for table in tables:
            if table.made_for is not None and table.made_for.model == model:
                return table
        raise CacheTableError(
            f"no cache table is shipped for this model ({model}); `pointillist search --cache-table --output "
            "FILE.json` learns one, and cache='table:FILE.json' takes it"
        )

    def __str__(self) -> str:
        return f"table {self.name}" + (f" (predictor={self.predictor})" if self.predictor != "last" else "")


def is_table(words: str) -> bool:
    """Whether a cache in words is a table: `table`, the shipped one, or `table:FILE`."""
    return words == "table" or words.startswith("table:")


def table_of(words: str, model: str) -> CacheTable:
    """Raises CacheTableError where there is none."""
    return CacheTable.shipped(model) if words == "table" else CacheTable.load(words.removeprefix("table:"))


def shift_of(scheduler: Any) -> float | None:
    """The shift of a scheduler's sigmas; None where it has none, or one that depends on the resolution."""
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return None
    return next((float(config[name]) for name in ("shift", "flow_shift") if config.get(name)), None)


def _check_rows(kind: str, rows: Any) -> None:
    if not isinstance(rows, tuple) or not 1 <= len(rows) <= MAX_STEPS:
        raise CacheTableError(f"{kind} must have a row for each step, 1 to {MAX_STEPS}")
    for row in rows:
        if not isinstance(row, str) or not 1 <= len(row) <= MAX_LAYERS or set(row) - {"0", "1"}:
            raise CacheTableError(f"{kind} has the row {row!r:.80}; it must be 1 to {MAX_LAYERS} digits 0 and 1")
        if len(row) != len(rows[0]):
            raise CacheTableError(f"{kind} has rows of {len(rows[0])} and of {len(row)} layers")


def _only_fields(cls: type, values: Any, what: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    known = (*cls.__dataclass_fields__, *also)  # type: ignore[attr-defined]
    if not isinstance(values, dict) or set(values) - set(known):
        raise CacheTableError(f"a {what} must be an object with the fields {', '.join(known)}")
    return dict(values)


def _made(cls: Any, values: dict[str, Any]) -> Any:
    try:
        return cls(**values)
    except TypeError as error:  # a field is missing
        raise CacheTableError(f"the cache table is not complete: {error}") from error


def _text(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
