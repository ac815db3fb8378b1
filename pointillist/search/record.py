"""`SearchRecord`: how a search found a plan. It lies in the plan's file, beside the plan, for reports."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
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
        values = {name: value for name, value in asdict(self).items() if name not in TENSORS}
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in TENSORS}
        plan.save(path, tensors, {KEY: json.dumps(values, allow_nan=False)})

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
            values["points"] = tuple(Point(**point) for point in values["points"])
            values["boundaries"] = tuple(values["boundaries"])
            record = cls(**values, **tensors)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise PlanError(f"cannot read how {os.fspath(path)} was found: {error}") from error
        record._check(path)
        return record

    def _check(self, path: str | os.PathLike[str]) -> None:
        """Raises PlanError unless all parts agree in their sizes and are numbers."""
        buckets, layers, heads = (self.errors.shape + (0, 0, 0))[:3]
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
            if tensor.shape != shape or tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
                raise PlanError(
                    f"{os.fspath(path)} holds a broken record of its search: {name} is {tensor.dtype} {tensor.shape}, "
                    f"it must be finite floating numbers {shape}"
                )
        if len(self.boundaries) != buckets:
            raise PlanError(f"{os.fspath(path)} holds {len(self.boundaries)} step buckets and errors for {buckets}")
