"""`space_time`: every query sees a band of tokens, of its frame's or of its place's in all frames (Sparse VideoGen 1).

A spatial head has the band |i − j| ≤ w in the sequence's own order, frame by frame; a temporal head the same band in
the order that puts a place's tokens of all frames together. Which of them a head is shows in every call: on the exact
rows of a few queries, the one whose output is nearer to the dense one, in the mean square. Those queries come from
everywhere in the video, and are tried with the very blocks that the density will keep; the original looks at the
first 10 000 tokens and at bands of a fixed width.

The band is as wide as the density says. `sink` lets all queries see the first latent frame, whose keys then are blocks
of their own in both orders (the original takes the first keys of either order, which in the temporal one are others).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from pointillist.accel.blocks import Blocks
from pointillist.accel.orders import order_of
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_range
from pointillist.accel.patterns.rows import sampled_index, softmax_rows
from pointillist.accel.tiles import Grid
from pointillist.kernels import uniform_bounds
from pointillist.kernels.layout import block_of_place


@dataclass(frozen=True)
class SpaceTime(Pattern):
    density: float
    sink: bool = False
    """All queries see the first latent frame; it counts to the density."""
    every: int = 1
    """A head's kind is found again every so many steps."""

    def __post_init__(self) -> None:
        check_range("every", self.every, 1, 1000)

    def select(self, call: Call) -> Selection:
        bands = _bands(call.grid, call.block, self.density, self.sink, call.device)
        temporal = self._temporal(call, bands)
        first_frame = None if call.grid[0] > 1 else 0
        largest = min(call.block, bands.query_order.shape[-1])
        queries = Blocks(bands.query_order[temporal], bands.query_bounds, largest, first_frame, uniform=True)
        keys = queries
        if self.sink:
            keys = Blocks(bands.key_order[temporal], bands.key_bounds, largest)
        mask = bands.mask[temporal]
        return Selection(queries, keys, mask, mask.shape[0] * mask.shape[1] * bands.pairs)

    def _temporal(self, call: Call, bands: "Bands") -> torch.Tensor:
        """int64 [B, H]: 1 for temporal heads, 0 for spatial ones."""
        step, known = call.memory.get("kinds", (0, None))
        if self.every > 1 and known is not None and 0 <= call.step - step < self.every:
            return known
        rows = softmax_rows(call, sampled_index(bands.query_order.shape[-1], call.device))
        v = call.video_v.to(rows.dtype)
        dense, errors = rows @ v, []
        for seen in bands.seen:
            part = rows * seen
            out = part @ v / part.sum(-1, keepdim=True).clamp(min=1e-30)
            errors.append((out - dense).square().sum((-1, -2)))
        kinds = torch.stack(errors, -1).argmin(-1)
        if self.every > 1:
            call.memory["kinds"] = (call.step, kinds)
        return kinds


class Bands(NamedTuple):
    """The spatial band and the temporal one."""

    query_order: torch.Tensor
    """int64 [2, N]; so is `key_order`, which has the first frame in front if it is a sink."""
    key_order: torch.Tensor
    query_bounds: torch.Tensor
    """int32 [1, 1, n + 1], the same in both orders; so are `key_bounds`."""
    key_bounds: torch.Tensor
    mask: torch.Tensor
    """bool [2, nq, nk]; the same twice without a sink."""
    seen: torch.Tensor
    """bool [2, R, N]: which keys the sampled queries see."""
    pairs: int
    """The block pairs of the fuller mask."""


@lru_cache(maxsize=64)
def _bands(grid: Grid, block: int, density: float, sink: bool, device: torch.device) -> Bands:
    orders = [order_of(name, grid).to(device) for name in ("thw", "hwt")]
    tokens, first = len(orders[0]), grid[1] * grid[2] if sink and grid[0] > 1 else 0
    q_bounds = k_bounds = uniform_bounds(tokens, block, device)
    if first:
        rest = uniform_bounds(tokens - first, block, device)[1:] + first
        k_bounds = torch.cat([uniform_bounds(first, block, device), rest])
    key_orders, masks, seen = [], [], []
    for order in orders:
        keys = torch.cat([torch.arange(first, device=device), order[order >= first]])
        mask = _band(order.argsort()[keys], q_bounds, k_bounds, first, density)
        rows = block_of_place(q_bounds[None, None], tokens)[0, 0][order.argsort()[sampled_index(tokens, device)]]
        columns = block_of_place(k_bounds[None, None], tokens)[0, 0][keys.argsort()]
        key_orders.append(keys)
        masks.append(mask)
        seen.append(mask[rows][:, columns])
    pairs = max(int(mask.sum()) for mask in masks)
    bounds = (q_bounds[None, None], k_bounds[None, None])
    return Bands(torch.stack(orders), torch.stack(key_orders), *bounds, torch.stack(masks), torch.stack(seen), pairs)


def _band(
    places: torch.Tensor, q_bounds: torch.Tensor, k_bounds: torch.Tensor, first: int, density: float
) -> torch.Tensor:
    """bool [nq, nk]: the pairs of blocks that hold tokens at most w apart, for the w whose density is nearest.

    Args:
        places: int64 [N], in the order of the key blocks: each key's place in the order of the queries, ascending
            within a block.
        first: keys that all see, in blocks of their own before the others.
    """
    starts, ends = q_bounds[:-1, None].long(), q_bounds[1:, None].long()
    low, high = places[k_bounds[:-1].long()], places[k_bounds[1:].long() - 1]
    gap = torch.maximum(low - ends + 1, starts - high).clamp(min=0)
    gap[:, k_bounds[:-1] < first] = 0
    widths, of_pair = gap.unique(return_inverse=True)
    area = (q_bounds.diff()[:, None] * k_bounds.diff()).double()
    kept = area.new_zeros(len(widths)).index_add_(0, of_pair.flatten(), area.flatten()).cumsum(0)
    return gap <= widths[(kept / area.sum() - density).abs().argmin()]


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(SpaceTime)
