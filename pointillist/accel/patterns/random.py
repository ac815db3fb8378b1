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
        count, heads = blocks.count, call.heads or range(call.q.shape[1])
        scores = [self._scores(call, head, count) for head in heads]
        return select_blocks(torch.stack(scores)[None], blocks, self.density)

    def _scores(self, call: Call, head: int, count: int) -> torch.Tensor:
        """Of a head, whichever others are computed with it."""
        seed = self.seed + 1_000_003 * call.layer + 10_007 * call.step + head
        generator = torch.Generator(call.device).manual_seed(seed)
        return torch.rand(count, count, device=call.device, generator=generator)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Random)
