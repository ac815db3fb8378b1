"""`masses`: every query block sees the key blocks that really hold its softmax mass, measured once and then frozen.

The log-sum-exp of dense attention turns one more pass over QKᵀ into the exact mass of every pair of blocks. That
costs as much as dense attention, so it is done at the last dense step (or the first sparse one, if there was none)
and its choice kept: what a head looks at changes little over the steps.

`rule="mass"` shares a head's budget so that every query block keeps the same share of its mass (LoSA), `rule="row"`
gives every query block the same number (AdaSpa), and `head_budget` moves budget from heads that need little of it to
those that need more (AdaSpa's head-adaptive sparsity).
"""

from dataclasses import dataclass

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, blocks_in
from pointillist.accel.patterns.choose import RULES, choose
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range
from pointillist.kernels import BlockLayout, block_masses

GOOD_RECALL = 0.8
"""Heads that keep more of their mass than this can do with less (AdaSpa)."""


@dataclass(frozen=True)
class Masses(Pattern):
    density: float
    order: str = "frames"
    """Of the blocks."""
    rule: str = "mass"
    """How a head's budget is shared among its query blocks: see `choose.py`."""
    recall: float = 0.0
    """If above 0, every query block keeps the fewest blocks with this share of its softmax mass, whatever the
    density (LoSA: 0.99; ZipVL)."""
    head_budget: bool = False
    """Of the heads that keep over 0.8 of their mass, at most half of all, the best give half of their density to as
    many of the worst; the mean stays."""
    rows: int = 0
    """Measure on so many queries of each block, evenly spaced; 0 is all. 16 of 128 take an eighth of the time."""
    refresh: int = 0
    """Measure anew after so many steps; 0 is never. AdaSpa does it once, 20 steps after the first time."""

    def __post_init__(self) -> None:
        check_choice("order", self.order, BLOCK_ORDERS)
        check_choice("rule", self.rule, RULES)
        check_range("recall", self.recall, 0, 1)
        check_range("rows", self.rows, 0, 1000)
        check_range("refresh", self.refresh, 0, 1000)

    def prepare(self, call: Call, out: torch.Tensor) -> None:
        self._measure(call)

    def select(self, call: Call) -> Selection:
        if "mask" not in call.memory or 0 < self.refresh <= call.step - call.memory["step"]:
            self._measure(call)
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        mask = unpacked(call.memory["mask"], blocks.count)
        return Selection(blocks, blocks, mask, mask.numel())

    def _measure(self, call: Call) -> None:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        call.memory["step"], call.memory["mask"] = call.step, packed(self._chosen(call, blocks))

    def _chosen(self, call: Call, blocks: Blocks) -> torch.Tensor:
        masses = exact_masses(call, blocks, self.rows)
        scores = log_per_token(masses, blocks)
        mask = choose(scores, blocks, blocks, self.density, self.rule, recall=self.recall)
        moved = min(self.density / 2, 1 - self.density)
        if not self.head_budget or moved <= 0 or self.recall > 0:
            return mask
        recall = kept_mass(masses, mask, blocks)
        heads = recall.shape[1]
        number = (recall > GOOD_RECALL).sum(-1, keepdim=True).clamp(max=heads // 2)
        rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        fewer, more = (choose(scores, blocks, blocks, self.density + change, self.rule) for change in (-moved, moved))
        mask = torch.where((rank < number)[..., None, None], fewer, mask)
        return torch.where((rank >= heads - number)[..., None, None], more, mask)


def exact_masses(call: Call, blocks: Blocks, rows: int = 0) -> torch.Tensor:
    """float32 [B, H, n, n]: the mean softmax weight that the queries of a block give to each key block; of so many
    queries of each, evenly spaced, if `rows` is not 0.

    Keys beside the video's have their share of the softmax: a row sums to what is left for the video.
    """
    return call.once(("masses", blocks, rows), lambda: _masses(call, blocks, rows))


def _masses(call: Call, blocks: Blocks, rows: int) -> torch.Tensor:
    tokens, count = blocks.order.shape[-1], blocks.count
    if rows == 0:
        q, lse, order, bounds, longest = call.video_q, call.video_lse, blocks.order, blocks.bounds, blocks.largest
    else:
        places = _evenly(blocks, rows)
        chosen = blocks.order.gather(-1, places.expand(*blocks.order.shape[:-1], -1))
        chosen = chosen.expand(*call.q.shape[:2], -1)
        q = call.video_q.gather(2, chosen[..., None].expand(-1, -1, -1, call.q.shape[-1]))
        lse, order, longest = call.lse_of(q), None, rows
        bounds = torch.arange(count + 1, dtype=torch.int32, device=call.device)[None, None] * rows
    layout = BlockLayout.from_bounds(
        torch.zeros(1, 1, count, count, dtype=torch.bool, device=call.device),  # which pairs are kept means nothing
        bounds,
        blocks.bounds,
        q.shape[2],
        tokens,
        max_query_block=longest,
        max_key_block=blocks.largest,
        pairs=0,
        query_order=order,
        key_order=blocks.order,
    )
    return block_masses(q, call.video_k, lse, layout, call.scale, call.backend)


def _evenly(blocks: Blocks, rows: int) -> torch.Tensor:
    """int64 [1|B, 1|H, n · rows]: places of so many tokens in each block; a small block's come several times."""
    starts, sizes = blocks.bounds[..., :-1, None].long(), blocks.bounds.diff()[..., None].long()
    middles = 2 * torch.arange(rows, device=blocks.bounds.device) + 1
    return (starts + middles * sizes // (2 * rows)).flatten(-2)


def log_per_token(masses: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """What `choose` ranks by: the logarithm of the mass for each token of a key block."""
    return (masses / blocks.sizes[..., None, :]).log()


def kept_mass(masses: torch.Tensor, mask: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """[B, H]: the share of a head's softmax mass that is not dropped; pairs beside the video's are always kept."""
    dropped = masses.masked_fill(mask, 0).sum(-1)
    return 1 - (dropped * blocks.sizes).sum(-1) / blocks.sizes.sum(-1)


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask [..., n] as bits, uint8 [..., ⌈n/8⌉]: one is kept for every layer and branch."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The bool mask [..., count] that was packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> shifts & 1).flatten(-2)[..., :count].bool()


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Masses)
