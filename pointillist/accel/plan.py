"""The plan: how every head of every layer computes attention, and its file."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pointillist.accel.patterns import DEFAULT_TAILS, PATTERNS
from pointillist.accel.schedule import Schedule
from pointillist.accel.tiles import Grid

SCHEMA = 1
TAILS = ("none", "pooled")


class PlanError(ValueError):
    """A plan, or the file it should come from, is not valid."""


@dataclass(frozen=True)
class Choice:
    """One entry of the pattern table: a pattern, its density, and what stands in for the dropped pairs."""

    pattern: str
    density: float
    tail: str


@dataclass(frozen=True)
class Plan:
    """How to compute attention. `assignment[layer][head]` is an index into `choices`; None is choice 0 everywhere."""

    choices: tuple[Choice, ...]
    schedule: Schedule = Schedule()
    assignment: tuple[tuple[int, ...], ...] | None = None
    block: int = 128
    """Tokens in a tile, at most."""
    name: str = "uniform"
    model: str | None = None
    """Fingerprint of the model that the plan is for; None fits any."""
    grid: Grid | None = None
    """Token grid that the plan was made on; it carries over to others."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known of it: hardware, predicted and measured cost and error, search settings."""

    def __post_init__(self) -> None:
        _require(0 < len(self.choices) <= 4096, f"a plan needs 1 to 4096 choices, not {len(self.choices)}")
        for choice in self.choices:
            _require(
                choice.pattern in PATTERNS, f"pattern {choice.pattern!r} is unknown; allowed are {', '.join(PATTERNS)}"
            )
            _require(
                _is_number(choice.density) and 0 < choice.density <= 1,
                f"density {choice.density!r} is not a number above 0 and at most 1",
            )
            _require(choice.tail in TAILS, f"tail {choice.tail!r} is not available; allowed are {', '.join(TAILS)}")
        _require(
            _is_whole(self.block) and 16 <= self.block <= 1024, f"block {self.block!r} is not a whole number from 16 to 1024"
        )
        schedule = self.schedule
        _require(
            _is_whole(schedule.dense_steps) and schedule.dense_steps >= 0,
            f"dense_steps {schedule.dense_steps!r} is not a whole number from 0",
        )
        above = schedule.dense_above
        _require(
            above is None or (_is_number(above) and 0 <= above <= 1), f"dense_above {above!r} is not a number from 0 to 1"
        )
        for row in self.assignment or ():
            _require(
                all(_is_whole(i) and 0 <= i < len(self.choices) for i in row),
                f"an assignment names a choice outside 0 to {len(self.choices) - 1}",
            )
            _require(
                len({self.choices[i].tail for i in row if self.choices[i].pattern != "dense"}) <= 1,
                "the heads of one layer must share their tail",
            )

    @classmethod
    def uniform(
        cls, pattern: str, density: float, *, tail: str = "default", dense_steps: int = 0, block: int = 128
    ) -> Plan:
        """The same everywhere, exactly as said: no minimum length, no dense layers, no break-even test.

        Args:
            pattern: "dense", "window" or "pooled".
            density: kept share of the pairs, above 0 and at most 1; 1 is dense.
            tail: "none", "pooled" (block means stand in for what is dropped), or the pattern's default.
            dense_steps: how many first steps stay dense.
            block: tokens in a tile, at most.

        Raises:
            PlanError: a value that is not allowed; the message says which are.
        """
        if tail == "default":
            tail = DEFAULT_TAILS.get(pattern, "none")
        return cls((Choice(pattern, density, tail),), Schedule(dense_steps=dense_steps), block=block)

    def choice_of(self, layer: int, head: int) -> Choice:
        """The choice for one head; a layer or head beyond the assignment's own takes the last one's."""
        if self.assignment is None:
            return self.choices[0]
        row = self.assignment[min(layer, len(self.assignment) - 1)]
        return self.choices[row[min(head, len(row) - 1)]]

    def with_density(self, density: float) -> Plan:
        """The same plan with the density of every sparse choice replaced."""
        return replace(
            self, choices=tuple(c if c.pattern == "dense" else replace(c, density=density) for c in self.choices)
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as one safetensors file, whole or not at all."""
        path = Path(path)
        header = {
            "schema": SCHEMA, "choices": [asdict(c) for c in self.choices], "schedule": asdict(self.schedule),
            "block": self.block, "name": self.name, "model": self.model, "grid": self.grid, "facts": self.facts,
        }  # fmt: skip
        rows = self.assignment if self.assignment is not None else ()
        tensors = {"assignment": torch.tensor(rows, dtype=torch.int32).reshape(len(rows), -1 if rows else 0)}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata={"pointillist_plan": json.dumps(header, allow_nan=False)})
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Any bytes give a plan or a `PlanError`; nothing is executed."""
        path = Path(path)
        if not path.is_file():
            raise PlanError(f"there is no plan file {str(path)!r}; give a file that `pointillist search` wrote")
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("pointillist_plan")
                _require(text is not None, f"{str(path)!r} is a safetensors file but no plan")
                rows = file.get_tensor("assignment")
            return cls._from_parts(json.loads(text), rows)
        except PlanError as error:
            raise PlanError(f"{str(path)!r} is not a valid plan: {error}") from None
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise PlanError(f"{str(path)!r} is not a plan file ({type(error).__name__}: {error})") from None

    @classmethod
    def _from_parts(cls, header: dict[str, Any], rows: torch.Tensor) -> Plan:
        _require(isinstance(header, dict), "its header is not an object")
        _require(header.get("schema") == SCHEMA, f"its schema is {header.get('schema')!r}; this version reads {SCHEMA}")
        _require(rows.ndim == 2 and rows.dtype == torch.int32, "its assignment is not a table of int32")
        grid, model, name, facts = header["grid"], header["model"], header["name"], header["facts"]
        _require(
            grid is None or (len(grid) == 3 and all(_is_whole(n) and 0 < n <= 1 << 16 for n in grid)),
            f"grid {grid!r} is not three sizes",
        )
        _require(
            isinstance(name, str) and isinstance(facts, dict) and (model is None or isinstance(model, str)),
            "its name, model or facts have a wrong type",
        )
        return cls(
            choices=tuple(Choice(c["pattern"], c["density"], c["tail"]) for c in header["choices"]),
            schedule=Schedule(header["schedule"]["dense_steps"], header["schedule"]["dense_above"]),
            assignment=tuple(tuple(row) for row in rows.tolist()) if rows.numel() else None,
            block=header["block"],
            name=name,
            model=model,
            grid=tuple(grid) if grid else None,  # type: ignore[arg-type]
            facts=facts,
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message)
