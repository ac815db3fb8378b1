"""`grid`: every query sees the keys at a stride from it, and at the phases beside it that weigh most.

Tokens with the same index modulo the stride are put together, so that the grid becomes dense blocks (MMInference's
grid head). Stride and phases are found on the exact rows of a few queries, for every head: the stride is that of the
frame (the same place in all frames: Sparse VideoGen's temporal head), of the row (the same column), or twice one of
them. A phase counts relative to the query, key − query modulo the stride; 0 comes first, the others by their mass.
A head keeps whole phases as long as they fit the density; of the next one, the pairs nearest in the sequence.

With `spread` phases are not found but dealt out: heads begin with different ones, a run for each, so that together
they see every key from a density little above 1 / heads on (S2-Attention). They then share the stride.

In joint sequences of text and video the layout keeps text exact, whatever the grid is (MMInference's boundary heads).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from pointillist.accel.blocks import Blocks
from pointillist.accel.patterns.choose import within_budget
from pointillist.accel.patterns.pattern import Call, Pattern, Selection
from pointillist.accel.patterns.rows import (
    diagonal_masses,
    lowest_within,
    ranks_of,
    sampled_index,
    sampled_places,
    softmax_rows,
)
from pointillist.accel.tiles import Grid as TokenGrid
from pointillist.kernels import uniform_bounds
from pointillist.kernels.layout import block_of_place


@dataclass(frozen=True)
class Grid(Pattern):
    density: float
    spread: bool = False
    """Every head has phases of its own in turn, instead of its best (S2-Attention)."""

    def select(self, call: Call) -> Selection:
        strides, (frames, height, width) = strides_of(call.grid), call.grid
        tokens = frames * height * width
        rows = softmax_rows(call, sampled_index(tokens, call.device))
        diagonals = diagonal_masses(rows, sampled_places(tokens))
        orders = [_ordered(stride, tokens, call.block, call.device) for stride in strides]
        masks = [self._mask(each, diagonals) for each in orders]
        held = torch.stack([_held(rows, *pair, call.block) for pair in zip(orders, masks, strict=True)], -1)
        if self.spread:
            held = held.sum(1, keepdim=True).expand_as(held)
        chosen = held.argmax(-1)
        order, mask = torch.stack([each.order for each in orders])[chosen], masks[0]
        for index, other in enumerate(masks):
            mask = torch.where(chosen[..., None, None] == index, other, mask)
        blocks = Blocks(order, orders[0].bounds, min(call.block, tokens), None if frames > 1 else 0, uniform=True)
        return Selection(blocks, blocks, mask, mask.numel())

    def _mask(self, along: "Ordered", diagonals: torch.Tensor) -> torch.Tensor:
        """bool [B|1, H, n, n]: the pairs of the first phases that fit the density."""
        ranks = dealt_ranks(along, diagonals.shape[1]) if self.spread else found_ranks(along, diagonals)
        lowest = lowest_within(torch.cat([ranks, ranks], -1), along.first, along.length, along.longest)
        wish = -(lowest + along.apart)
        wish.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
        return within_budget(wish, along.area, self.density)


class Ordered(NamedTuple):
    """The tokens sorted by phase, in blocks, and the phases of pairs of blocks; i is a query block, j a key block."""

    stride: int
    order: torch.Tensor
    """int64 [N]."""
    bounds: torch.Tensor
    """int32 [1, 1, n + 1]."""
    first: torch.Tensor
    """int64 [n, n]: pair (i, j) has the relative phases `first` to `first + length`, modulo the stride."""
    length: torch.Tensor
    longest: int
    apart: torch.Tensor
    """float64 [n, n]: how far apart in the sequence its tokens are on average, as a share of N: less than 1."""
    area: torch.Tensor
    """float32 [n, n]: its token pairs."""
    row_blocks: torch.Tensor
    """int64 [R]: the query blocks of the sampled rows."""


def strides_of(grid: TokenGrid) -> tuple[int, ...]:
    """The strides to choose from; 1, under which everything is one phase, where the video is a single row."""
    frames, height, width = grid
    wanted = {width, 2 * width, height * width, 2 * height * width}
    return tuple(sorted(stride for stride in wanted if 1 < stride < frames * height * width)) or (1,)


@lru_cache(maxsize=64)
def _ordered(stride: int, tokens: int, block: int, device: torch.device) -> Ordered:
    order = (torch.arange(tokens, device=device) % stride).argsort(stable=True)
    bounds = uniform_bounds(tokens, block, device)
    starts, ends, sizes = bounds[:-1].long(), bounds[1:].long(), bounds.diff()
    low, high = order[starts] % stride, order[ends - 1] % stride
    first = (low - high[:, None]) % stride
    length = ((high - low)[:, None] + (high - low) + 1).clamp(max=stride)
    sums = torch.nn.functional.pad(order.double().cumsum(0), (1, 0))
    centres = (sums[ends] - sums[starts]) / sizes / tokens
    apart = (centres[:, None] - centres).abs()
    block_of_token = torch.empty_like(order).scatter_(0, order, block_of_place(bounds[None, None], tokens)[0, 0])
    row_blocks = block_of_token[sampled_index(tokens, device)]
    area = (sizes[:, None] * sizes).float()
    return Ordered(stride, order, bounds[None, None], first, length, int(length.max()), apart, area, row_blocks)


def found_ranks(along: Ordered, diagonals: torch.Tensor) -> torch.Tensor:
    """int64 [B, H, stride]: 0 for relative phase 0, the others by their mass, from that of diagonals [B, H, 2N − 1]."""
    stride, zero = along.stride, diagonals.shape[-1] // 2
    before = -zero % stride
    folded = torch.nn.functional.pad(diagonals, (before, -(diagonals.shape[-1] + before) % stride))
    phases = folded.unflatten(-1, (-1, stride)).sum(-2)
    phases[..., 0] = float("inf")
    return ranks_of(phases)


def dealt_ranks(along: Ordered, heads: int) -> torch.Tensor:
    """int64 [1, H, stride]: 0 for relative phase 0; head h of H goes on from phase h · stride / H."""
    phases, head = (torch.arange(n, device=along.order.device) for n in (along.stride, heads))
    starts = head * along.stride // heads
    ranks = (phases - starts[:, None]) % along.stride + 1
    return ranks.masked_fill(phases == 0, 0)[None]


def _held(rows: torch.Tensor, along: Ordered, mask: torch.Tensor, block: int) -> torch.Tensor:
    """[B, H]: the mass of the sampled rows [B, H, R, N] within the kept pairs."""
    blocks = mask.shape[-1]
    ordered = torch.nn.functional.pad(rows[..., along.order], (0, blocks * block - rows.shape[-1]))
    return (ordered.unflatten(-1, (blocks, block)).sum(-1) * mask[:, :, along.row_blocks]).sum((-1, -2))


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Grid)
