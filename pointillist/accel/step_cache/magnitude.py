"""Calibrated magnitude curve: how much the stack's residual shrinks or grows from step to step (MagCache).

γ_t = mean over tokens of ‖R_t‖ / ‖R_{t−1}‖ is nearly the same for all prompts. Since the last computed step, q is the
product of the curve's values and the expected error the sum of |1 − q|; a step is reused while that stays below the
threshold. Reads nothing back from the device. Curves are of one model: shipped ones are data of MagCache (Apache-2.0,
Zehong Ma et al.), others are calibrated (`pointillist bench cache`, then `magnitude:file=FILE`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from pointillist.accel.step_cache.calibration import MadeWith, check_curve, made_with, read_shipped
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
    made_with: tuple[Any, ...] = ()
    """Of a calibrated curve: the values of a `MadeWith`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.curve, str):
            if self.curve not in shipped_curves():
                given = f"curve {self.curve!r:.80} is not shipped" if self.curve else "a curve is needed"
                raise ValueError(f"{given}; shipped are {', '.join(shipped_curves())}")
        else:
            check_curve(self.curve)
        made_with(self.made_with)

    @property
    def calibrated(self) -> MadeWith | None:
        return shipped_curves()[self.curve][1] if isinstance(self.curve, str) else made_with(self.made_with)

    def reuse(self, seen: Seen) -> bool:
        curve = at_steps(shipped_curves()[self.curve][0] if isinstance(self.curve, str) else self.curve, seen.steps)
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
def shipped_curves() -> dict[str, tuple[tuple[float, ...], MadeWith]]:
    """By the name of the model: the curve, and what is known of how it was made."""
    return read_shipped("magnitude_curves.json")
