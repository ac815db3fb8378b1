"""Modulated-input polynomial: how much the timestep's modulation changed, through a fitted polynomial (TeaCache).

d = mean|m_t − m_{t−1}| / mean|m_{t−1}| of the projection that modulates the blocks; a polynomial of degree four, fitted
for one model, turns it into the expected change of the output. These add up until a step is computed. In models where
the modulation knows only the timestep (Wan), the same steps are reused for every prompt. Polynomials that ship are data
of TeaCache (Apache-2.0, ali-vilab), those of Wan for the projected modulation; others are calibrated (`pointillist
bench cache`, then `modulated:file=FILE`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from pointillist.accel.step_cache.calibration import MadeWith, check_polynomial, made_with, read_shipped
from pointillist.accel.step_cache.decider import Decider, Seen, relative_change

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Modulated(Decider):
    NAME: ClassVar[str] = "modulated"

    threshold: float = 0.1
    polynomial: str | tuple[float, ...] = (1.0, 0.0)
    """Its coefficients, highest degree first, or the name of a shipped one; by default the change itself."""
    made_with: tuple[Any, ...] = ()
    """Of a calibrated polynomial: the values of a `MadeWith`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.polynomial, str):
            if self.polynomial not in shipped_polynomials():
                raise ValueError(
                    f"polynomial {self.polynomial!r:.80} is not shipped; shipped are {', '.join(shipped_polynomials())}"
                )
        else:
            check_polynomial(self.polynomial)
        made_with(self.made_with)

    @property
    def calibrated(self) -> MadeWith | None:
        known = self.polynomial
        return shipped_polynomials()[known][1] if isinstance(known, str) else made_with(self.made_with)

    def reuse(self, seen: Seen) -> bool:
        if seen.modulation is None:
            raise ValueError(f"{seen.model} does not tell what modulates its blocks; cache by another decider")
        before, seen.memory["modulation"] = seen.memory.get("modulation"), seen.modulation
        if before is None:
            return False
        change, expected = float(relative_change(seen.modulation, before)), 0.0
        known = self.polynomial
        for coefficient in shipped_polynomials()[known][0] if isinstance(known, str) else known:
            expected = expected * change + coefficient
        seen.memory["expected"] = seen.memory.get("expected", 0.0) + max(0.0, expected)
        seen.memory["distance"] = seen.memory["expected"]
        return seen.memory["expected"] < self.threshold

    def bytes_kept(self, seen: Seen, out: torch.Tensor, branches: int) -> int:
        return 0 if seen.modulation is None else seen.modulation.nbytes

    def computed(self, seen: Seen, out: torch.Tensor) -> None:
        seen.memory["expected"] = 0.0


@lru_cache(maxsize=1)
def shipped_polynomials() -> dict[str, tuple[tuple[float, ...], MadeWith]]:
    """By the name of the model: the coefficients, and what is known of how they were made."""
    return read_shipped("modulation_polynomials.json")
