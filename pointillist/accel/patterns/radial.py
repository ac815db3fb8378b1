"""`radial`: bands around the same place in other frames, the narrower the farther the frame (Radial Attention).

The paper's rule for two frames at distance d, of n tokens each, with P = 2^bit_length(n) and g = bit_length(d): up to
d = 1 everything; beyond, keys whose index in the frame is nearer than max(decay·P/2^g, 128); and where P/2^g is less
than 128, only every (128·2^g/P)-th frame. The first frame may be a sink: it counts as a neighbour of all.

`size` 0.5 is that with the least decay of the paper, 0.2. Up to there all bands widen, later the farther the frame;
from there the decay grows, beyond 1 the thinning gives way to it, and at 1 nothing is left out.
"""

from dataclasses import dataclass

import torch

from pointillist.accel.blocks import BLOCK_ORDERS
from pointillist.accel.patterns.geometry import Geometric, Places
from pointillist.accel.patterns.pattern import check_choice, check_range
from pointillist.accel.tiles import Grid

LEAST_DECAY = 0.2


@dataclass(frozen=True)
class Radial(Geometric):
    size: float
    order: str = "thw"
    """Of the blocks. Runs of the sequence cover bands of rows best: where 0.19 of the pairs on (11, 30, 52) are wanted,
    blocks of 128 keep 0.29; `frames` 0.47, `tiles` 0.78."""
    sink: bool = True
    """Every query sees of the first latent frame what it sees of a neighbouring one."""
    least: int = 128
    """From size 0.5 on no band is narrower, in tokens to either side; more distant frames are thinned out instead."""

    def __post_init__(self) -> None:
        check_range("size", self.size, 1e-6, 1)
        check_choice("order", self.order, BLOCK_ORDERS)
        check_range("least", self.least, 1, 65536)

    def wants(self, q: Places, k: Places) -> torch.Tensor:
        widths = self.half_widths(q.grid).ceil().int().to(q.t.device)
        mine, other = ((each.h * each.grid[2] + each.w).int() for each in (q, k))
        return (mine - other).abs() < widths[q.t, k.t]

    def half_widths(self, grid: Grid) -> torch.Tensor:
        """float64 [T, T]: how near in its frame a key must be, for every frame of queries and of keys."""
        frames, per_frame = grid[0], grid[1] * grid[2]
        whole = 1 << per_frame.bit_length()
        t = torch.arange(frames)
        apart = (t[:, None] - t).abs()
        distance = apart.clone()
        if self.sink:
            distance[:, 0].clamp_(max=1)
        bit_length = distance.double().frexp().exponent
        halved = whole / 2.0**bit_length
        enough = 2 ** (frames - 1).bit_length() * max(1.0, self.least / whole)
        decay = LEAST_DECAY * (enough / LEAST_DECAY) ** max(0.0, 2 * self.size - 1)
        every = 2 ** (self.least / (halved * max(1.0, decay))).log2().floor().clamp(min=0)
        bands = (decay * halved).clamp(min=self.least).masked_fill(distance % every != 0, 0)
        bands[distance <= 1] = whole
        return bands * (4 * self.size - apart.double() / frames).clamp(0, 1)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Radial)
