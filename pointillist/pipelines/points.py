"""The points of a search's curve as plan files: written as soon as they are found, so that any of them can be used."""

from __future__ import annotations

import json
from pathlib import Path

from pointillist.accel.plan import PlanError
from pointillist.search.find import Curve
from pointillist.search.record import Point

KEY = "pointillist.point"
FOLDER = "points"


def write_points(folder: Path, curve: Curve) -> None:
    """In place of those that were there. Raises OSError."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    for number, (point, plan) in enumerate(curve):
        plan.save(place / f"{number:02}.safetensors", metadata={KEY: json.dumps(vars(point), allow_nan=False)})
    for old in sorted(place.glob("*.safetensors"))[len(curve) :]:
        old.unlink()


def read_points(folder: Path) -> list[tuple[Point, Path]]:
    """Those that there are by now, with their plans' files, from the slowest to the fastest. Raises PlanError."""
    return [(_point(path), path) for path in sorted((folder / FOLDER).glob("*.safetensors"))]


def _point(path: Path) -> Point:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return Point(**json.loads((file.metadata() or {})[KEY]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path} is no point of a search: {error}") from error
