"""`SearchRecord`: how a search found a plan. It lies in the plan's file, beside the plan, for reports."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pointillist.accel.plan import Plan, PlanError

KEY = "pointillist.search"
TENSORS = ("errors", "sensitivity", "dense_seconds", "plan_seconds", "true_maps", "kept_maps")


@dataclass(frozen=True)
class Point:
    """One plan of the Pareto curve: what was predicted of it, and what was measured where it was run."""

    name: str
    density: float
    """Mean over the calls of sparse steps."""
    predicted_speedup: float
    """Of denoising, dense over plan."""
    predicted_psnr: float
    """dB against the dense clip."""
    measured_speedup: float | None = None
    measured_psnr: float | None = None
    measured_ssim: float | None = None
    chosen: bool = False
    """It is the plan in this file."""

    @property
    def predicted(self) -> tuple[float, float]:
        """Speed-up and PSNR."""
        return self.predicted_speedup, self.predicted_psnr

    @property
    def measured(self) -> tuple[float, float] | None:
        """Likewise, if it was run."""
        if self.measured_speedup is None or self.measured_psnr is None:
            return None
        return self.measured_speedup, self.measured_psnr


@dataclass(frozen=True)
class SearchRecord:
    """What the search measured and predicted."""

    settings: dict[str, Any]
    """Model, prompts, steps, seed, grid, wish, hardware and versions, as text and numbers."""
    points: tuple[Point, ...]
    """From the slowest plan to the fastest."""
    seconds: dict[str, float]
    """What it cost, by phase; `dense clip` is one dense clip for comparison."""
    boundaries: tuple[float, ...]
    """Step buckets: bucket i begins at this share of the first step's sigma; descending, the first is 1."""
    errors: np.ndarray = field(repr=False)
    """float32 [buckets, layers, heads]: the predicted relative error of each head's output under the plan."""
    sensitivity: np.ndarray = field(repr=False)
    """float32 [buckets, layers]: how much an error there moves the final latents, the mean being 1."""
    dense_seconds: np.ndarray = field(repr=False)
    """float32 [layers]: predicted seconds of one dense attention call."""
    plan_seconds: np.ndarray = field(repr=False)
    """float32 [buckets, layers]: predicted seconds of one attention call under the plan."""
    true_maps: np.ndarray = field(repr=False)
    """float16 [layers, heads, n, n]: a head's attention in one call, pooled over runs of tokens; rows sum to 1."""
    kept_maps: np.ndarray = field(repr=False)
    """float16 [layers, heads, n, n]: the share of the token pairs that the plan keeps there, from 0 to 1."""

    def save(self, plan: Plan, path: str | os.PathLike[str]) -> None:
        """Write the plan's file with this record in it."""
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in TENSORS}
        plan.save(path, tensors, {KEY: json.dumps(self.facts(), allow_nan=False)})

    def facts(self) -> dict[str, Any]:
        """All but the arrays, as a JSON object holds it."""
        return {
            "settings": self.settings,
            "points": [vars(point) for point in self.points],
            "seconds": self.seconds,
            "boundaries": list(self.boundaries),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchRecord | None:
        """The record in a plan's file; None if no search made the plan. Raises PlanError for a broken one."""
        if os.fspath(path).endswith(".json"):
            return None
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                text = (file.metadata() or {}).get(KEY)
                if text is None:
                    return None
                tensors = {name: file.get_tensor(name) for name in TENSORS}
            values = json.loads(text)
            json.dumps(values, allow_nan=False)  # refuses NaN and Infinity, which `loads` lets through
            values["points"] = tuple(Point(**point) for point in values["points"])
            values["boundaries"] = tuple(values["boundaries"])
            record = cls(**values, **tensors)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise PlanError(f"cannot read how {os.fspath(path)} was found: {error}") from error
        record._check(path)
        return record

    def _check(self, path: str | os.PathLike[str]) -> None:
        """Raises PlanError unless all parts agree in their sizes, and every value is one that a report can show."""
        broken = f"{os.fspath(path)} holds a broken record of its search"
        buckets, layers, heads = (*self.errors.shape, 0, 0, 0)[:3]
        cells = self.true_maps.shape[-1] if self.true_maps.ndim else 0
        wanted = {
            "errors": (buckets, layers, heads),
            "sensitivity": (buckets, layers),
            "dense_seconds": (layers,),
            "plan_seconds": (buckets, layers),
            "true_maps": (layers, heads, cells, cells),
            "kept_maps": (layers, heads, cells, cells),
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            right = tensor.shape == shape and tensor.size > 0 and tensor.dtype.kind == "f"
            if not right or not np.isfinite(tensor).all() or (tensor < 0).any():
                raise PlanError(
                    f"{broken}: {name} is {tensor.dtype} {tensor.shape}, "
                    f"it must be finite floating numbers, 0 or more, {shape}, and not empty"
                )
        if len(self.boundaries) != buckets:
            raise PlanError(f"{broken}: it has {len(self.boundaries)} step buckets and errors for {buckets}")
        if not all(_is_number(each) for each in self.boundaries) or not _descends_from_1(self.boundaries):
            raise PlanError(f"{broken}: boundaries are {self.boundaries!r:.200}; they must descend from 1 to above 0")
        if not isinstance(self.settings, dict):
            raise PlanError(f"{broken}: settings are {self.settings!r:.200}; they must be an object")
        if not isinstance(self.seconds, dict) or not all(_is_number(each) for each in self.seconds.values()):
            raise PlanError(f"{broken}: seconds are {self.seconds!r:.200}; they must be numbers by phase")
        for point in self.points:
            _check_point(point, broken)


def _check_point(point: Point, broken: str) -> None:
    measured = (point.measured_speedup, point.measured_psnr, point.measured_ssim)
    figures = (point.density, point.predicted_speedup, point.predicted_psnr, *measured)
    is_text = isinstance(point.name, str) and isinstance(point.chosen, bool)
    if not is_text or not all(_is_number(each) for each in figures[:3]):
        raise PlanError(f"{broken}: a point of the curve is {point!r:.300}; its predictions must be numbers")
    if not all(each is None or _is_number(each) for each in measured):
        raise PlanError(
            f"{broken}: a point of the curve is {point!r:.300}; what was measured must be numbers or absent"
        )


def _descends_from_1(shares: tuple[float, ...]) -> bool:
    return shares[0] == 1 and shares[-1] > 0 and all(a > b for a, b in pairwise(shares))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
