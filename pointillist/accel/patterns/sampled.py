"""`sampled`: every query block sees the key blocks where a sample of its tokens attends most (BLADE; PSA).

Of every block some tokens, evenly spaced, stand for it: their real attention among each other, softmax over all sampled
keys, is reduced over a pair of blocks to the score of the pair. The maximum finds single strong keys that a mean hides.

BLADE's mask (ASA) samples 32 of 128 tokens and keeps 95 % of the energy, clamped to 5 to 17 % of the blocks: here the
density says. PSA's importance is the same with a quarter of each block's tokens. Costs samples² / block² of the scores
of dense attention. BLADE's global branch attends to the means of all keys, kept ones once more; `tail="pooled"` counts
none twice. (Video-BLADE; Pyramid Sparse Attention)
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, blocks_in
from pointillist.accel.patterns.channels import on_channels
from pointillist.accel.patterns.choose import RULES, select_blocks
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range
from pointillist.accel.tiles import Grid

SCORES_AT_ONCE = 2**26
"""Scores in memory at a time; those of all samples of a long video do not fit."""


@dataclass(frozen=True)
class Sampled(Pattern):
    density: float
    order: str = "frames"
    """Of the blocks; PSA and BLADE: `gilbert`."""
    rule: str = "mass"
    """How a head's budget is shared among its query blocks: see `choose.py`."""
    recall: float = 0.0
    """If above 0, every query block keeps the fewest blocks with this share of its estimated softmax mass, whatever the
    density (LoSA: 0.99; ZipVL)."""
    samples: int = 16
    """Tokens of a block; blocks that have no more are taken whole. In the embedded model 32 cost three times as much
    and choose hardly better."""
    channels: int = 0
    """Score on so many channels, those of the largest |q|·|k| (Double Sparsity); 0 is all."""
    reduce: str = "max"
    """Of the attention of a pair's samples: `max`, or `mean`."""

    def __post_init__(self) -> None:
        check_choice("order", self.order, BLOCK_ORDERS)
        check_choice("rule", self.rule, RULES)
        check_range("recall", self.recall, 0, 1)
        check_range("samples", self.samples, 1, 4096)
        check_range("channels", self.channels, 0, 4096)
        check_choice("reduce", self.reduce, ("max", "mean"))

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        return select_blocks(self._scores(call), blocks, self.density, self.rule, self.recall)

    def _scores(self, call: Call) -> torch.Tensor:
        """The logarithm of the reduced attention [B, H, n, n], some query blocks at a time."""
        chosen, valid, full = sample(self.order, call.grid, call.block, self.samples, call.device)
        wide = torch.promote_types(call.q.dtype, torch.float32)
        q, k = (x[:, :, chosen.flatten()].to(wide) for x in (call.video_q, call.video_k))
        q, k = on_channels(call, q, k, self.channels)
        (batch, heads), (count, width) = q.shape[:2], chosen.shape
        step = max(1, SCORES_AT_ONCE // (batch * heads * chosen.numel() * width))
        parts = []
        for first in range(0, count, step):
            rows = slice(first * width, (first + step) * width)
            logits = q[:, :, rows] @ k.mT * call.scale
            if not full:
                logits = logits.masked_fill(~valid.flatten(), float("-inf"))
            # Reduced over keys before the softmax's sum is taken off: a pass over all scores less.
            of_keys = logits.unflatten(-1, (count, width))
            of_keys = of_keys.amax(-1) if self.reduce == "max" else of_keys.logsumexp(-1)
            of_pairs = (of_keys - logits.logsumexp(-1, keepdim=True)).unflatten(2, (-1, width))
            of_pairs = of_pairs.masked_fill(~valid[first : first + step, :, None], float("-inf"))
            parts.append(of_pairs.amax(3) if self.reduce == "max" else of_pairs.logsumexp(3))
        scores = torch.cat(parts, dim=2)
        if self.reduce == "max":
            return scores
        number = valid.sum(-1).to(wide).log()
        return scores - number[:, None] - number


@lru_cache(maxsize=64)
def sample(
    order: str, grid: Grid, block: int, samples: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """int64 [n, m], tokens of every block, evenly spaced; bool [n, m], false where a block has fewer than m; and
    whether none has."""
    blocks = blocks_in(order, grid, block, torch.device("cpu"))
    sizes, starts = blocks.bounds[0, 0].diff().long()[:, None], blocks.bounds[0, 0, :-1].long()[:, None]
    width = min(samples, blocks.largest)
    taken = sizes.clamp(max=width)
    number = torch.arange(width).expand(blocks.count, -1)
    place = starts + (2 * number.minimum(taken - 1) + 1) * sizes // (2 * taken)
    valid = number < taken
    return blocks.order[0, 0, place].to(device), valid.to(device), bool(valid.all())


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Sampled)
