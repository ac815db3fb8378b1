"""`sla`: every query block sees the key blocks with the highest pooled scores, and the rest linearly if trained (SLA).

Blocks are pooled, k less its mean over the video, and scored by q̄·k̄ without scale or softmax; a row keeps the highest
ones (critical), drops the lowest ones (negligible) and gives those between (marginal) to linear attention, whose output
goes through a trained projection: O = O_sparse + proj_l(O_linear), φ = softmax over the channels. Taking the mean off k
shifts the scores of a row by one number, which changes no order. The own block is kept here in any case.

`proj_l.weight` [D, D] (and `proj_l.bias` [D]) comes from the attention module or from `accelerate(weights=FILE)`.
Without it, as with one of zeros, the method is top-k alone. The linear branch covers the video, not other segments:
those are exact. (SLA; SageSLA; TurboDiffusion)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, block_means, blocks_in
from pointillist.accel.patterns.choose import select_blocks
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range
from pointillist.accel.trained import added_to_video, check_shape, trained
from pointillist.kernels import BlockLayout, linear_attention, top_k

PROJECTION, BIAS = "proj_l.weight", "proj_l.bias"
MARGINAL = "sla: marginal pairs"


@dataclass(frozen=True)
class Sla(Pattern):
    TAIL: ClassVar[str] = "none"
    ADDS: ClassVar[bool] = True
    density: float
    order: str = "frames"
    """Of the blocks."""
    negligible: float = 0.1
    """Share of every row's blocks, those of the lowest scores, that neither branch sees."""
    marginal: bool = True
    """The linear branch sees the marginal pairs, as in the paper; false: all pairs, as in the released code."""

    def __post_init__(self) -> None:
        check_choice("order", self.order, BLOCK_ORDERS)
        check_range("negligible", self.negligible, 0, 1)

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        k_means = block_means(call.video_k, blocks)
        k_mean = (k_means * blocks.sizes[..., None]).sum(2, keepdim=True) / blocks.order.shape[-1]
        scores = block_means(call.video_q, blocks) @ (k_means - k_mean).mT
        selection = select_blocks(scores, blocks, self.density)
        if PROJECTION in call.weights:
            call.memory[MARGINAL] = self._linear_pairs(scores, selection.mask)
        return selection

    def finish(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        found = trained(call, "sla", (PROJECTION,), "top-k alone")
        if found is None:
            return out
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        linear = over_pairs(call, blocks, call.memory.pop(MARGINAL)).to(torch.promote_types(out.dtype, torch.float32))
        weight, bias, dim = found[0].to(linear.dtype), call.weights.get(BIAS), out.shape[-1]
        check_shape(PROJECTION, weight, (dim, dim))
        projected = linear @ weight.mT
        if bias is not None:
            check_shape(BIAS, bias, (dim,))
            projected = projected + bias.to(projected)
        return added_to_video(call, out, projected)

    def _linear_pairs(self, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """bool [B, H, n, n]: the pairs of the linear branch."""
        if not self.marginal:
            return torch.ones_like(kept)
        lowest = round(self.negligible * scores.shape[-1])
        return ~kept & ~top_k(-scores, lowest) if lowest else ~kept


def over_pairs(call: Call, blocks: Blocks, pairs: torch.Tensor) -> torch.Tensor:
    """Linear attention of the video's tokens over block pairs [B, H, n, n]: [B, H, N, D]."""
    tokens = blocks.order.shape[-1]
    layout = BlockLayout.from_bounds(
        torch.zeros_like(pairs[:1, :1]), blocks.bounds, blocks.bounds, tokens, tokens, pairs=1,
        max_query_block=blocks.largest, max_key_block=blocks.largest, query_order=blocks.order, key_order=blocks.order,
    )  # fmt: skip
    q, k, v = call.video_q, call.video_k, call.video_v
    return linear_attention(q, k, v, lambda x: x.softmax(-1), layout, pairs=pairs, backend=call.backend)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Sla)
