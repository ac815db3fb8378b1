"""`seer`: every query block sees the key blocks that a trained gate points to (SeerAttention).

A block of queries is pooled to its mean, a block of keys to its maximum, minimum and mean side by side; two trained
projections take both to a space of Dg channels, and the scores are their products over √Dg, softmax over the blocks,
the highest of a row. The softmax changes no order of a row, so it is left to rules that add up masses.

`attn_gate_q.weight` [Dg, D] and `attn_gate_k.weight` [Dg, 3·D], or of every head [H, Dg, ·], come from the attention
module or from `accelerate(weights=FILE)`, trained on q and k as attention sees them (the original pools them before
RoPE and turns the pooled ones). Without them the scores are those of plain means, and the pattern is `pooled` in the
same order.
"""

from dataclasses import dataclass

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, block_means, blocks_in
from pointillist.accel.patterns.choose import RULES, select_blocks
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, index_of
from pointillist.accel.trained import check_shape, trained

GATES = ("attn_gate_q.weight", "attn_gate_k.weight")


@dataclass(frozen=True)
class Seer(Pattern):
    density: float
    order: str = "frames"
    """Of the blocks."""
    rule: str = "row"
    """How a head's budget is shared among its query blocks: see `choose.py`."""

    def __post_init__(self) -> None:
        check_choice("order", self.order, BLOCK_ORDERS)
        check_choice("rule", self.rule, RULES)

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        return select_blocks(self._scores(call, blocks), blocks, self.density, self.rule)

    def _scores(self, call: Call, blocks: Blocks) -> torch.Tensor:
        """Logits of the gate [B, H, n, n]."""
        q, k = block_means(call.video_q, blocks), block_means(call.video_k, blocks)
        found = trained(call, "seer", GATES, "scores of plain means")
        if found is None:
            return q @ k.mT * call.scale
        q = projected(call, GATES[0], found[0], q)
        extremes = (block_extremes(call.video_k, blocks, kind).to(k) for kind in ("amax", "amin"))
        k = projected(call, GATES[1], found[1], torch.cat([*extremes, k], dim=-1))
        return q @ k.mT * q.shape[-1] ** -0.5


def projected(call: Call, name: str, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x [B, H, n, F] through a weight [Dg, F], or [heads of the site, Dg, F]: [B, H, n, Dg]."""
    check_shape(name, weight, (None, x.shape[-1]), (call.q.shape[1] if call.heads is None else None, None, x.shape[-1]))
    if weight.ndim == 3 and call.heads is not None:
        weight = weight.index_select(0, index_of(call.heads, weight.device))
    return x @ weight.to(x.dtype).mT


def block_extremes(x: torch.Tensor, blocks: Blocks, kind: str) -> torch.Tensor:
    """The largest (`amax`) or smallest (`amin`) value of every channel in every block: [B, H, n, D]."""
    block_of = blocks.block_of_token()[..., None].expand_as(x)
    found = x.new_zeros(*x.shape[:2], blocks.count, x.shape[-1])
    return found.scatter_reduce_(2, block_of, x, kind, include_self=False)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Seer)
