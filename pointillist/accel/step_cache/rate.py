"""Input–output rate: the output's change is predicted from the latents', by the rate last seen (EasyCache).

At computed steps k = mean|out − out'| / mean|x − x'|, both of this computed step and the one before. At every step the
output is expected to change by k·mean|x − x_before| / mean|out|, x_before being the preceding step's latents, computed
or not; expected changes add up until a step is computed. No calibration, no knowledge of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pointillist.accel.step_cache.decider import Decider, Seen

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rate(Decider):
    NAME: ClassVar[str] = "rate"

    threshold: float = 0.05

    def reuse(self, seen: Seen) -> bool:
        memory = seen.memory
        before, memory["x before"] = memory.get("x before"), seen.x
        if before is None or "rate" not in memory:
            return False
        expected = memory["rate"] * _mean(seen.x - before) / _mean(memory["out"])
        memory["expected"] = memory.get("expected", 0.0) + float(expected.max())
        memory["distance"] = memory["expected"]
        return memory["expected"] < self.threshold

    def bytes_kept(self, seen: Seen, out: torch.Tensor, branches: int) -> int:
        """Latents of two steps, which the branches share, and the last output of each."""
        return 2 * seen.x.nbytes + branches * out.nbytes

    def computed(self, seen: Seen, out: torch.Tensor) -> None:
        memory = seen.memory
        if "out" in memory:
            memory["rate"] = _mean(out - memory["out"]) / _mean(seen.x - memory["x"]).clamp(min=1e-12)
        memory["x"], memory["out"], memory["expected"] = seen.x, out, 0.0


def _mean(x: torch.Tensor) -> torch.Tensor:
    """[B]: of absolute values."""
    return x.float().abs().flatten(1).mean(1)
