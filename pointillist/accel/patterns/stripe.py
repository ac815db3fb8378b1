"""`stripe`: all queries of a head see the same key blocks, or those of a group of query blocks do.

by = "mass"     one group: the key blocks with the highest mass on the exact rows of a few queries (Sparse-vDiT's
                vertical stripes, found for every call and head instead of offline)
by = "anchor"   groups of `step` query blocks (AnchorAttention): the anchor is the highest pooled score of the group
                among its own blocks, their neighbours and the first block; a key block is kept where it falls short
                of the anchor by little. How little follows from the density, and is the same for the whole head: the
                groups that need many stripes get them from those that have one far above all others.

AnchorAttention's stripes are single key columns, gathered; here they are whole key blocks. Every group has at least
one, and every block sees itself. The region of the anchor is not kept for its own sake.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, block_means, blocks_in
from pointillist.accel.patterns.choose import within_budget
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range
from pointillist.accel.patterns.rows import sampled_index, softmax_rows
from pointillist.accel.tiles import Grid

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stripe(Pattern):
    density: float
    by: str = "mass"
    """What stripes are chosen by: mass or anchor."""
    step: int = 4
    """By anchor, so many query blocks share their stripes (16 in AnchorAttention, of a longer text)."""
    order: str = "frames"
    """Of the blocks."""

    def __post_init__(self) -> None:
        check_choice("by", self.by, ("mass", "anchor"))
        check_range("step", self.step, 1, 4096)
        check_choice("order", self.order, BLOCK_ORDERS)

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        step = self.step if self.by == "anchor" else blocks.count
        group_of = torch.arange(blocks.count, device=call.device) // step
        groups = torch.arange(-(-blocks.count // step), device=call.device)
        sizes = blocks.sizes[0, 0]
        inside = (groups[:, None] == group_of) * sizes
        if self.by == "anchor":
            wish = _below_anchor(call, blocks, inside)
        else:
            mass = softmax_rows(call, sampled_index(blocks.order.shape[-1], call.device)).sum(2)
            wish = block_means(mass[..., None], blocks).transpose(-1, -2)
        area = (inside.sum(-1, keepdim=True) - inside) * sizes  # what a stripe adds to blocks that see themselves
        own = _own_share(self.order, call.grid, call.block)
        stripes = within_budget(wish, area, (self.density - own) / max(1 - own, 1e-9))
        mask = stripes[:, :, group_of]
        mask.diagonal(dim1=-2, dim2=-1).fill_(True)
        return Selection(blocks, blocks, mask, mask.numel())


def _below_anchor(call: Call, blocks: Blocks, tokens: torch.Tensor) -> torch.Tensor:
    """[B, H, groups, n]: the score of a group's mean query and a block's mean key, less the group's anchor.

    Args:
        tokens: float32 [groups, n], how many of a block's tokens belong to the group.
    """
    means = block_means(call.video_q, blocks)
    queries = (tokens / tokens.sum(-1, keepdim=True)).to(means.dtype) @ means
    scores = queries @ block_means(call.video_k, blocks).transpose(-1, -2) * call.scale
    region = tokens > 0
    near = region.clone()
    near[:, :-1] |= region[:, 1:]
    near[:, 1:] |= region[:, :-1]
    near[:, 0] = True
    return scores - scores.masked_fill(~near, float("-inf")).amax(-1, keepdim=True)


@lru_cache(maxsize=64)
def _own_share(order: str, grid: Grid, block: int) -> float:
    """The density of blocks that see themselves."""
    sizes = blocks_in(order, grid, block, CPU).sizes.double()
    return float(sizes.square().sum() / sizes.sum().square())


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Stripe)
