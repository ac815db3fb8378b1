"""Calibrated magnitude curve: how much the stack's residual shrinks or grows from step to step (MagCache).

γ_t = mean over tokens of ‖R_t‖ / ‖R_{t−1}‖ is nearly the same for all prompts. Since the last computed step, q is the
product of the curve's values and the expected error the sum of |1 − q|; a step is reused while that stays below the
threshold. Reads nothing back from the device. Curves are of one model: shipped ones are data of MagCache (Apache-2.0,
Zehong Ma et al.), others are calibrated (`pointillist bench cache`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pointillist.accel.step_cache.decider import Decider, Seen

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Magnitude(Decider):
    NAME: ClassVar[str] = "magnitude"
    ADAPTIVE: ClassVar[bool] = False

    threshold: float = 0.12
    curve: str | tuple[float, ...] = ""
    """γ of every step, 1 for the first, or the name of a shipped one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.curve, str):
            if self.curve not in shipped_curves():
                given = f"curve {self.curve!r:.80} is not shipped" if self.curve else "a curve is needed"
                raise ValueError(f"{given}; shipped are {', '.join(shipped_curves())}")
        elif not all(isinstance(each, int | float) and 0 < each < 1e3 for each in self.curve):
            raise ValueError("curve must hold numbers above 0")

    def reuse(self, seen: Seen) -> bool:
        curve = at_steps(shipped_curves()[self.curve] if isinstance(self.curve, str) else self.curve, seen.steps)
        q, error = seen.memory.get("q", 1.0), seen.memory.get("error", 0.0)
        q *= curve[seen.step]
        error += abs(1 - q)
        seen.memory.update(q=q, error=error, distance=error)
        return error < self.threshold

    def computed(self, seen: Seen, out: torch.Tensor) -> None:
        seen.memory.update(q=1.0, error=0.0)


@lru_cache(maxsize=64)
def at_steps(curve: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """The curve for another number of steps: of each step the value of the nearest one."""
    if len(curve) == steps:
        return curve
    last = max(1, steps - 1)
    return tuple(curve[round(step * (len(curve) - 1) / last)] for step in range(steps))


@lru_cache(maxsize=1)
def shipped_curves() -> dict[str, tuple[float, ...]]:
    """By the name of the model."""
    text = Path(__file__).with_name("magnitude_curves.json").read_text(encoding="utf-8")
    return {name: tuple(values) for name, values in json.loads(text).items()}
