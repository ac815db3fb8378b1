"""`pyramid`: the key blocks of the strongest sampled attention exactly, the others by means of few or of many tokens.

Blocks are ranked and kept as by `sampled`. Then the ranking of a query block's dropped ones goes on: those that hold
the first `share` of the dropped mass are seen as means of runs of `finest` tokens, those with the same share of what
is left as means of longer runs, and so on; what the last level leaves is the mean of its whole block, or nothing. The
level of a block follows from the mass *before* it, so that a heavy block does not push itself to a coarser level.

A mean's logit is raised by the logarithm of its number of tokens. The means are a tail: with `tail="none"` only the
exact blocks remain. PSA's levels are runs of 2, 4 and 8 tokens and then nothing (`levels=3, finest=2, growth=2,
rest="none"`). Every query block masks all means on a GPU, so that a level of runs of n tokens costs up to 1/n of dense
attention there, whatever sees it: hence 4 and 16 here. (Pyramid Sparse Attention)
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import torch

from pointillist.accel.blocks import blocks_in
from pointillist.accel.patterns.choose import block_masses_of, choose
from pointillist.accel.patterns.pattern import Call, Selection, check_choice, check_range
from pointillist.accel.patterns.sampled import Sampled
from pointillist.accel.tiles import Grid
from pointillist.kernels import Means, pool_blocks
from pointillist.kernels.pooling import in_order


@dataclass(frozen=True)
class Pyramid(Sampled):
    levels: int = 2
    """Of pooled keys, between the exact ones and the rest."""
    finest: int = 4
    """Tokens that a mean of the finest level stands for."""
    growth: int = 4
    """How many times as many tokens a mean of the next level stands for."""
    share: float = 0.5
    """Of the mass that finer levels leave, what each level takes."""
    rest: str = "mean"
    """What stands in for blocks below the last level: `mean`, that of each block, or `none`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("levels", self.levels, 0, 6)
        check_range("finest", self.finest, 1, 4096)
        check_range("growth", self.growth, 2, 64)
        check_range("share", self.share, 0, 1)
        check_choice("rest", self.rest, ("mean", "none"))
        if self.levels == 0 and self.rest == "none":
            raise ValueError("levels is 0 and rest is 'none': a pyramid without means; use the pattern sampled")

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        scores = self._scores(call)
        kept = choose(scores, blocks, blocks, self.density, self.rule, recall=self.recall)
        masses = block_masses_of(scores, blocks).masked_fill(kept, -1)  # behind all dropped ones
        highest, order = masses.sort(dim=-1, descending=True, stable=True)
        in_rank = highest.clamp(min=0)
        before = (in_rank.cumsum(-1) - in_rank) / in_rank.sum(-1, keepdim=True).clamp(min=1e-30)
        level_in_rank = sum((before >= edge).long() for edge in self._edges())
        level = torch.empty_like(order).scatter_(-1, order, level_in_rank).masked_fill(kept, -1)
        return Selection(blocks, blocks, kept, kept.numel(), means=partial(self._means, level))

    def _edges(self) -> list[float]:
        """Where level 1, 2, … begin, as a share of the dropped mass; level 0, the finest, begins at 0."""
        return [1 - (1 - self.share) ** level for level in range(1, self.levels + 1)]

    def _means(self, level: torch.Tensor, call: Call) -> Means:
        """The means of all levels one after the other. level: int64 [B, H, n, n], that of each pair, −1 for exact."""
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        k, v = (in_order(x, blocks.order) for x in (call.video_k, call.video_v))
        keys, values, log_counts, pairs = [], [], [], []
        for number in range(self.levels + (self.rest == "mean")):
            size = blocks.largest if number == self.levels else min(blocks.largest, self.finest * self.growth**number)
            bounds, block_of_run = runs(self.order, call.grid, call.block, size, call.device)
            keys.append(pool_blocks(k, bounds)[0])
            values.append(pool_blocks(v, bounds)[0])
            log_counts.append(bounds.diff().float().log())
            pairs.append((level == number).index_select(-1, block_of_run))
        return Means(torch.cat(keys, 2), torch.cat(values, 2), torch.cat(log_counts, -1), torch.cat(pairs, -1))


@lru_cache(maxsize=64)
def runs(order: str, grid: Grid, block: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Every block cut into runs of `size` places, the last of each shorter: bounds int32 [1, 1, n+1], and the block
    that each run is of, int64 [n]."""
    bounds = blocks_in(order, grid, block, torch.device("cpu")).bounds[0, 0].tolist()
    starts = [(place, i) for i, (start, stop) in enumerate(pairwise(bounds)) for place in range(start, stop, size)]
    places, blocks = zip(*starts, strict=True)
    return torch.tensor([[[*places, bounds[-1]]]], dtype=torch.int32, device=device), torch.tensor(blocks).to(device)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Pyramid)
