"""`random`: tiles at random, their own among them. What a pattern is worth shows beside this one at equal density."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pointillist.accel.blocks import blocks_in
from pointillist.accel.patterns.choose import choose
from pointillist.accel.patterns.pattern import Call, Pattern, Selection


@dataclass(frozen=True)
class Random(Pattern):
    STATIC: ClassVar[bool] = True
    density: float
    seed: int = 0

    def select(self, call: Call) -> Selection:
        blocks = blocks_in("tiles", call.grid, call.block, call.device)
        drawn = torch.rand(1, 1, blocks.count, blocks.count, generator=torch.Generator().manual_seed(self.seed))
        mask = choose(drawn.to(call.device), blocks, blocks, self.density)
        return Selection(blocks, blocks, mask, int(mask.sum()))


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Random)
