"""`random`: blocks at random, the own one among them, others in every layer, head and step.

What a pattern is worth shows beside this one at equal density.
"""

from dataclasses import dataclass

import torch

from pointillist.accel.blocks import blocks_in
from pointillist.accel.patterns.choose import select_blocks
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_range


@dataclass(frozen=True)
class Random(Pattern):
    density: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**31)

    def select(self, call: Call) -> Selection:
        blocks = blocks_in("frames", call.grid, call.block, call.device)
        seed = self.seed + 1_000_003 * call.layer + 10_007 * call.step + (call.heads[0] if call.heads else 0)
        generator = torch.Generator(call.device).manual_seed(seed)
        shape = (1, call.q.shape[1], blocks.count, blocks.count)
        return select_blocks(torch.rand(shape, device=call.device, generator=generator), blocks, self.density)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Random)
