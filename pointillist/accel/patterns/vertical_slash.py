"""`vertical_slash`: every query sees the heaviest keys, and those at the heaviest distances from it (MInference).

Columns and diagonals are ranked by their summed mass on the exact rows of a few queries. MInference takes a prompt's
last 64 queries and looks back only; a video is not causal, so here the rows come from everywhere in it and diagonals
go both ways. A block pair is kept if it holds a chosen column or diagonal, or is a block with itself.

Of the density, the share `vertical` of what the blocks with themselves leave goes to columns, in whole key blocks.
Diagonals get the rest: whole ones as long as they fit, and of the next one the pairs that it crosses longest.
"""

from dataclasses import dataclass

import torch

from pointillist.accel.blocks import blocks_in
from pointillist.accel.orders import ORDERS
from pointillist.accel.patterns.choose import within_budget
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range
from pointillist.accel.patterns.rows import (
    diagonal_masses,
    lowest_within,
    ranks_of,
    sampled_index,
    sampled_places,
    softmax_rows,
)
from pointillist.kernels import top_k


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    density: float
    vertical: float = 0.5
    """The share of the budget that goes to columns."""
    order: str = "thw"
    """Of the tokens: distances are counted along it, in blocks of equal length."""

    def __post_init__(self) -> None:
        check_range("vertical", self.vertical, 0, 1)
        check_choice("order", self.order, ORDERS)

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        order, bounds, sizes = blocks.order[0, 0], blocks.bounds[0, 0].long(), blocks.sizes[0, 0]
        rows = softmax_rows(call, order[sampled_index(len(order), call.device)])[..., order]
        diagonals = diagonal_masses(rows, sampled_places(len(order)))

        first = bounds[:-1] - bounds[1:, None] + len(order)  # block i's last query to block j's first key
        length = (sizes[:, None] + sizes).long() - 1
        lowest = lowest_within(ranks_of(diagonals), first, length, 2 * blocks.largest - 1)
        best = diagonals.argsort(dim=-1, descending=True, stable=True).gather(-1, lowest.flatten(2)).view_as(lowest)
        off_centre = (best - first - (length - 1) / 2).abs().double()  # of the block pair; less than a block
        wish = -(lowest + off_centre / blocks.largest)

        per_row = self.density * len(order) / blocks.largest - 1  # blocks that a row has beside its own
        if columns := min(blocks.count, int(self.vertical * max(0.0, per_row))):
            padded = torch.nn.functional.pad(rows.sum(2), (0, blocks.count * blocks.largest - len(order)))
            heaviest = padded.unflatten(-1, (blocks.count, -1)).amax(-1)
            wish = wish.masked_fill(top_k(heaviest[:, :, None], columns), 1)
        wish.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
        mask = within_budget(wish, sizes[:, None] * sizes, self.density)
        return Selection(blocks, blocks, mask, mask.numel())


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(VerticalSlash)
