"""`pooled`: every query block sees the key blocks with the highest pooled scores.

The score of a block is that of the mean of its keys, q̄·k̄/√D: the logarithm of the softmax mass for each token that
it costs (Jenga; Sol-Attn). Ranking by the whole mass, with + ln n, would favour the larger blocks and so keep more
than the density asks for.

Its options make other methods of it: `order="gilbert"` is Jenga, `rule="above"` Sol-Attn's threshold, `rule="head"`
over frames' patches DraftAttention, `similarity` SpargeAttn's guard for blocks whose mean says little.
"""

from dataclasses import dataclass, replace

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, block_means, blocks_in
from pointillist.accel.patterns.choose import RULES, select_blocks
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range


@dataclass(frozen=True)
class Pooled(Pattern):
    density: float
    order: str = "frames"
    """Of the blocks."""
    rule: str = "row"
    """How a head's budget is shared among its query blocks: see `choose.py`."""
    recall: float = 0.0
    """If above 0, every query block keeps the fewest blocks with this share of its estimated softmax mass, whatever the
    density (LoSA: 0.99; ZipVL)."""
    similarity: float = -1.0
    """Blocks whose tokens' mean cosine similarity is not above it are seen by all and see all (SpargeAttn, stage 1;
    there −0.1 to 0.6). They come on top of the density. −1 is off."""

    def __post_init__(self) -> None:
        check_choice("order", self.order, BLOCK_ORDERS)
        check_choice("rule", self.rule, RULES)
        check_range("recall", self.recall, 0, 1)
        check_range("similarity", self.similarity, -1, 1)

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        scores = call.means_of_q(blocks) @ call.means_of_k(blocks).mT * call.scale  # log masses per token
        selection = select_blocks(scores, blocks, self.density, self.rule, self.recall)
        if self.similarity > -1:
            loose_q, loose_k = (self_similarity(x, blocks) <= self.similarity for x in (call.video_q, call.video_k))
            mask = selection.mask | loose_q[..., None] | loose_k[..., None, :]
            return replace(selection, mask=mask, pairs=mask.numel())
        return selection


def self_similarity(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Mean cosine similarity of all pairs of tokens of every block [B, H, n]: the squared length of the mean of the
    tokens' directions."""
    return block_means(torch.nn.functional.normalize(x.float(), dim=-1), blocks).square().sum(-1)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Pooled)
