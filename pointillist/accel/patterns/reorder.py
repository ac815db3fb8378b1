"""`reorder`: every head sees the heaviest blocks, in the order of the axes that suits it best (PAROAttention).

A head that looks along time has scattered attention frame by frame and compact attention once the same place of all
frames lies together. Which of the six orders of T, H and W suits a head hardly depends on step or prompt: it is
found on a sample of its attention at the last dense step (or the first sparse one, if there was none), and the pairs
of blocks with the most softmax mass in that order are kept from then on.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from pointillist.accel.blocks import Blocks
from pointillist.accel.orders import AXES, order_of
from pointillist.accel.patterns.choose import RULES, choose
from pointillist.accel.patterns.masses import exact_masses, log_per_token, packed, unpacked
from pointillist.accel.patterns.pattern import (
    Call,
    Pattern,
    Selection,
    check_choice,
    check_range,
)
from pointillist.accel.tiles import Grid
from pointillist.kernels import uniform_bounds

SAMPLED_BLOCKS = 8
"""Query blocks of each order, evenly spaced, on which it is tried out."""
SMALL = 1e-3 * 17_776
"""A weight below so many mean weights is small. The paper's threshold is 1e-3 where a row has 17 776 weights; as a
multiple of their mean it carries to any length."""
SMALL_SHARE = 0.9
"""A block is sparse if at least this share of its weights is small."""
WEIGHTS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Reorder(Pattern):
    density: float
    alpha: float = 0.5
    """How much it counts that blocks are sparse; the rest counts that they are even, as quantisation wants them."""
    rule: str = "head"
    """How a head's budget is shared among its query blocks: see `choose.py`."""
    refresh: int = 0
    """Choose pairs anew after so many steps, in the same order; 0 is never, the paper has 1. It costs as much as
    dense attention, once in so many steps."""
    until: int = 0
    """From this step on they are not chosen anew; 0 is no limit. The paper has half of the steps."""

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_range("alpha", self.alpha, 0, 1)
        check_range("refresh", self.refresh, 0, 1000)
        check_range("until", self.until, 0, 1000)

    def prepare(self, call: Call, out: torch.Tensor) -> None:
        self._choose_pairs(call)

    def select(self, call: Call) -> Selection:
        since = call.step - call.memory.get("step", call.step)
        if "mask" not in call.memory or (0 < self.refresh <= since and not 0 < self.until <= call.step):
            self._choose_pairs(call)
        blocks = self._blocks(call)
        mask = unpacked(call.memory["mask"], blocks.count)
        return Selection(blocks, blocks, mask, mask.numel())

    def _choose_pairs(self, call: Call) -> None:
        if "axes" not in call.memory:
            call.memory["axes"] = call.once(("axes", self.alpha), lambda: chosen_axes(call, self.alpha))
        blocks = self._blocks(call)
        scores = log_per_token(exact_masses(call, blocks), blocks)
        mask = choose(scores, blocks, blocks, self.density, self.rule)
        call.memory["step"], call.memory["mask"] = call.step, packed(mask)

    def _blocks(self, call: Call) -> Blocks:
        axes = call.memory["axes"]
        return call.once(("reordered", axes), lambda: self._reordered(call, axes))

    def _reordered(self, call: Call, axes: torch.Tensor) -> Blocks:
        order = six_orders(call.grid, call.device)[axes]
        bounds = uniform_bounds(order.shape[-1], call.block, call.device)[None, None]
        return Blocks(order, bounds, min(call.block, order.shape[-1]), uniform=True)


@lru_cache(maxsize=16)
def six_orders(grid: Grid, device: torch.device) -> torch.Tensor:
    """int64 [6, N]: the token at each place of every order in `AXES`."""
    return torch.stack([order_of(name, grid) for name in AXES]).to(device)


def chosen_axes(call: Call, alpha: float) -> torch.Tensor:
    """int64 [B, H]: the order, as an index into `AXES`, of the lowest score of every head.

    The score is α·(1 − sparse) + (1 − α)·uneven, both divided by their sums over the six orders: `sparse` is the
    share of blocks that are sparse, `uneven` the mean over blocks of largest by mean weight.
    """
    found = [block_likeness(call, order) for order in six_orders(call.grid, call.device)]
    sparse, uneven = (torch.stack(each) for each in zip(*found, strict=True))
    sparse, uneven = (x / x.sum(0).clamp(min=1e-30) for x in (sparse, uneven))
    return (alpha * (1 - sparse) + (1 - alpha) * uneven).argmin(0)


def block_likeness(call: Call, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse` and `uneven`, [B, H] each, of the attention among the video's tokens in `order` [N], on sampled query
    blocks."""
    count = -(-len(order) // call.block)
    wide = torch.promote_types(call.q.dtype, torch.float32)
    (batch, heads), keys = call.q.shape[:2], call.k.shape[2]
    sparse, uneven = (torch.zeros(batch, heads, dtype=wide, device=call.device) for _ in range(2))
    step = max(1, WEIGHTS_AT_ONCE // (call.block * keys))
    number = min(SAMPLED_BLOCKS, count)
    sampled = [i * (count - 1) // max(1, number - 1) for i in range(number)]
    parts = [(b, slice(h, h + step)) for b in range(batch) for h in range(0, heads, step)]
    for b, some in parts:
        k = call.video_k[b, some].index_select(1, order).to(wide)
        for i in sampled:
            rows = order[i * call.block : (i + 1) * call.block]
            q, lse = (x[b, some].index_select(1, rows).to(wide) for x in (call.video_q, call.video_lse))
            weights = (q @ k.mT * call.scale - lse[..., None]).exp()
            is_sparse, ratio = _per_block(weights, call.block, SMALL / keys)
            sparse[b, some] += is_sparse / len(sampled)
            uneven[b, some] += ratio / len(sampled)
    return sparse, uneven


def _per_block(weights: torch.Tensor, block: int, small: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of weights [H, rows, N], cut into blocks of columns: the share of sparse ones, the mean of largest by mean."""
    rows, tokens = weights.shape[-2:]
    area = rows * uniform_bounds(tokens, block, weights.device).diff().to(weights.dtype)
    columns = torch.nn.functional.pad(weights, (0, -tokens % block), value=-1.0).unflatten(-1, (-1, block))
    numbers = ((columns >= 0) & (columns < small)).sum(dim=(-3, -1))
    largest, mean = columns.amax(dim=(-3, -1)), columns.clamp(min=0).sum(dim=(-3, -1)) / area
    ratio = torch.where(mean > 0, largest / mean, 1.0)
    return (numbers >= SMALL_SHARE * area.double()).to(weights.dtype).mean(-1), ratio.mean(-1)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Reorder)
