"""`antidiagonal`: every query block sees the key blocks with the most softmax mass, estimated from antidiagonals of
small squares of scores (XAttention).

Blocks are cut into squares of `stride` queries × `stride` keys. The mean score over the antidiagonal of a square
speaks for all of it: it touches every query, every key, and whatever row, column or diagonal crosses the square. It
is one product of long vectors, `stride` keys one after the other times as many queries in reversed turn, so that all
squares cost 1/stride of QKᵀ.
"""

from dataclasses import dataclass

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, blocks_in
from pointillist.accel.patterns.choose import RULES, select_blocks
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range

SCORES_AT_ONCE = 2**25


@dataclass(frozen=True)
class Antidiagonal(Pattern):
    density: float
    stride: int = 8
    """Tokens on a side of the squares; at most a block."""
    order: str = "thw"
    """Of the blocks."""
    rule: str = "mass"
    """How a head's budget is shared among its query blocks: see `choose.py`."""

    def __post_init__(self) -> None:
        check_range("stride", self.stride, 1, 256)
        check_choice("order", self.order, BLOCK_ORDERS)
        check_choice("rule", self.rule, RULES)

    def select(self, call: Call) -> Selection:
        stride = min(self.stride, call.block)
        block = call.block - call.block % stride  # so that only the last block of equal ones has an incomplete square
        blocks = blocks_in(self.order, call.grid, block, call.device)
        masses = antidiagonal_masses(call, blocks, stride)
        scores = (masses / blocks.sizes[..., None, :]).log()
        return select_blocks(scores, blocks, self.density, self.rule)


def antidiagonal_masses(call: Call, blocks: Blocks, stride: int) -> torch.Tensor:
    """[B, H, n, n]: the mean share of the softmax over the squares beside one another that each key block has.

    Blocks may be of any sizes. Where the last square of a block is incomplete, the score is the mean over the
    antidiagonal's pairs that exist, and the square counts as the keys or queries that it has.
    """
    across = -(-blocks.largest // stride)
    tokens, there = squares(blocks, across * stride)
    exists = there.view(-1, stride).to(torch.promote_types(call.q.dtype, torch.float32))
    k = _gathered(call.video_k, tokens, there).unflatten(2, (-1, stride)).flatten(3)
    q = _gathered(call.video_q, tokens, there).unflatten(2, (-1, stride)).flip(3).flatten(3)
    bias = (exists.sum(-1) / stride).log()
    masses = []
    step = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * across * k.shape[2]))
    for first in range(0, blocks.count, step):
        rows = slice(first * across, (first + step) * across)
        pairs = exists[rows].flip(1) @ exists.mT
        scores = _products(q[:, :, rows], k) * call.scale / pairs.clamp(min=1) + bias
        shares = scores.masked_fill(pairs == 0, -1e30).softmax(-1).unflatten(3, (-1, across)).sum(-1)
        shares = (shares * exists[rows].sum(-1, keepdim=True)).unflatten(2, (-1, across)).sum(3)
        masses.append(shares / blocks.sizes[0, 0, first : first + step, None])
    return torch.cat(masses, dim=2)


def squares(blocks: Blocks, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 and bool [n, width]: the tokens of every block, and which of them it has."""
    bounds = blocks.bounds[0, 0].long()
    places = bounds[:-1, None] + torch.arange(width, device=bounds.device)
    there = places < bounds[1:, None]
    return blocks.order[0, 0][places.clamp(max=blocks.order.shape[-1] - 1)], there


def _gathered(x: torch.Tensor, tokens: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """x [B, H, N, D] at `tokens`, one block after the other, and 0 where there is none."""
    return x.index_select(2, tokens.flatten()).masked_fill(~there.flatten()[:, None], 0)


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q·kᵀ in float32 or wider; on a GPU half precision goes in as it is, or this would cost as much as attention."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        products = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out_dtype=torch.float32)
        return products.unflatten(0, q.shape[:2])
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) @ k.to(wide).mT


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Antidiagonal)
