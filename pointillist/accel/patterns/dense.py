"""`dense`: every query sees every key."""

from dataclasses import dataclass
from typing import ClassVar

from pointillist.accel.blocks import blocks_in
from pointillist.accel.patterns.pattern import Call, Pattern, Selection


@dataclass(frozen=True)
class Dense(Pattern):
    STATIC: ClassVar[bool] = True
    TAIL: ClassVar[str] = "none"
    density: float = 1.0

    def select(self, call: Call) -> Selection:
        blocks = blocks_in("tiles", call.grid, call.block, call.device)
        mask = blocks.order.new_ones(1, 1, blocks.count, blocks.count).bool()
        return Selection(blocks, blocks, mask, mask.numel())


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Dense)
