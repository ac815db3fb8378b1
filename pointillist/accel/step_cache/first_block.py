"""First-block distance: how much the first blocks' residual changed since it was last computed.

First-Block-Cache (ParaAttention) with one block, DBCache (cache-dit) with several: relative L1 distance of the residual
to that of the last computed step. Costs these blocks in every step, and reads a number back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pointillist.accel.step_cache.decider import Decider, Seen, relative_change

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FirstBlock(Decider):
    NAME: ClassVar[str] = "first_block"
    SHARED: ClassVar[bool] = False

    threshold: float = 0.08
    blocks: int = 1
    """So many blocks are always computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks!r}; it must be a whole number, 1 or more")

    @property
    def blocks_before(self) -> int:
        return self.blocks

    def reuse(self, seen: Seen) -> bool:
        before = seen.memory.get("front")
        if before is None or self.threshold == 0:
            return False
        assert seen.front is not None
        distance = float(relative_change(seen.front, before))
        seen.memory["distance"] = distance
        return distance <= self.threshold

    def bytes_kept(self, seen: Seen, out: torch.Tensor, branches: int) -> int:
        return branches * (0 if seen.front is None else seen.front.nbytes)

    def computed(self, seen: Seen, out: torch.Tensor) -> None:
        seen.memory["front"] = seen.front
