"""`neighborhood`: every query sees the tokens around it in space and time, a box (NATTEN, GNA, DiNA) or a ball (CLEAR).

A box is as wide on every axis as `size` says, and at the border of the video it moves inwards instead of shrinking.
With a stride, groups of queries share the box of their middle one (GNA); with a dilation, a token sees only those whose
coordinates leave the same remainders as its own (DiNA). Each block then holds tokens of the same remainders: others
would hold all of them, and a dilated box would cost as much as the box around it. It never sees more than about one in
dilation³ tokens, and a wish for more gives that.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, blocks_in
from pointillist.accel.patterns.geometry import CPU, Geometric, Places, rasterise
from pointillist.accel.patterns.pattern import Call, Selection, check_choice, check_range
from pointillist.accel.tiles import Grid, Segment

SHAPES = ("box", "circle")


@dataclass(frozen=True)
class Neighborhood(Geometric):
    size: float
    """Of the box on every axis, as a share of the axis; of the ball's radius, as a share of the video's diagonal."""
    order: str = "tiles"
    """Of the blocks."""
    shape: str = "box"
    """`circle` sees what is nearer than a radius, in tokens, and is cut off at the border."""
    dilation: int = 1
    """Of a box, on every axis that is as long."""
    stride: int = 1
    """Of a box: so many queries share it, on every axis. No box is smaller."""

    def __post_init__(self) -> None:
        check_range("size", self.size, 1e-6, 1)
        check_choice("order", self.order, BLOCK_ORDERS)
        check_choice("shape", self.shape, SHAPES)
        most = 1 if self.shape == "circle" else 4096
        check_range("dilation", self.dilation, 1, most)
        check_range("stride", self.stride, 1, most)

    @classmethod
    def at_density(
        cls, density: float, grid: Grid, segments: tuple[Segment, ...] = (), block: int = 128, **options: Any
    ) -> Self:
        """The tokens of equal remainders are a smaller video, of which a larger share is to be kept."""
        cls.check_values(options)
        dilation = options.get("dilation", 1)
        steps = [min(dilation, length) for length in grid]
        t, h, w = (-(-length // step) for length, step in zip(grid, steps, strict=True))
        share = min(1.0, density * math.prod(steps))
        return replace(
            super().at_density(share, (t, h, w), segments, block, **{**options, "dilation": 1}), dilation=dilation
        )

    def wants(self, q: Places, k: Places) -> torch.Tensor:
        if self.shape == "circle":
            squares = (q.t - k.t).square() + (q.h - k.h).square() + (q.w - k.w).square()
            return squares < self.size**2 * sum(length**2 for length in q.grid)
        t, h, w = (
            in_window(mine, other, length, self.size, self.dilation, self.stride)
            for mine, other, length in zip((q.t, q.h, q.w), (k.t, k.h, k.w), q.grid, strict=True)
        )
        return t & h & w

    def select(self, call: Call) -> Selection:
        if self.dilation == 1:
            return super().select(call)
        blocks = _dilated_blocks(self.order, call.grid, call.block, self.dilation, call.device)
        mask = rasterise(self.wants, call.grid, blocks)[None, None]
        return Selection(blocks, blocks, mask, int(mask.sum()))


def in_window(
    q: torch.Tensor, k: torch.Tensor, length: int, size: float, dilation: int = 1, stride: int = 1
) -> torch.Tensor:
    """Whether coordinates k lie in the windows of q on an axis: the share `size` of those of q's remainder."""
    step = min(dilation, length)
    rest, place = q % step, q // step
    count = (length - rest + step - 1) // step
    group = count.clamp(max=stride)
    width = (count.double() * size).round().long().maximum(group)
    middle = (place // group * group + group // 2).minimum(count - 1)
    first = (middle - width // 2).clamp(min=0).minimum(count - width)
    inside = (k // step >= first) & (k // step < first + width)
    return inside if step == 1 else inside & (k % step == rest)


def _dilated_blocks(order: str, grid: Grid, block: int, dilation: int, device: torch.device) -> Blocks:
    """Blocks of tokens whose coordinates leave the same remainders."""
    tokens = torch.arange(math.prod(grid)).view(grid)
    steps = [min(dilation, length) for length in grid]
    orders, sizes = [], []
    for rests in itertools.product(*(range(step) for step in steps)):
        alike = tokens[tuple(slice(rest, None, step) for rest, step in zip(rests, steps, strict=True))]
        t, h, w = alike.shape
        blocks = blocks_in(order, (t, h, w), block, CPU)
        orders.append(alike.flatten()[blocks.order[0, 0]])
        sizes.append(blocks.bounds[0, 0].diff())
    each = torch.cat(sizes)
    bounds = torch.nn.functional.pad(each.cumsum(0), (1, 0)).int()
    return Blocks(torch.cat(orders).to(device)[None, None], bounds.to(device)[None, None], int(each.max()))


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Neighborhood)
