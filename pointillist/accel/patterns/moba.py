"""`moba`: query blocks see chunks of frames, of columns through time or of boxes, in turn by layer (VMoBA).

The keys are cut into chunks, one layer by frames (1-D), the next by columns through all of time (2-D), the next by
boxes (3-D), so that three layers together mix everything. The gate of a chunk is q·(mean of its keys). A query sees its
own chunk and those of the highest gates.

VMoBA chooses for every query token, which a block kernel cannot follow: here a block of queries, a piece of a chunk,
chooses by its mean gate. To compute all that its tokens would choose for themselves, a block would have to take their
union: `inefficiency` says how much more that is. Of made-up calls of 5×18×20 tokens in boxes, blocks of 64, density
0.25 and `rule="row"`: 4.0 times, which is everything, where queries are independent, and 2 to 3 times where neighbours
are alike.

VMoBA is trained with its chunks and adds no weights. Its threshold on the gates, cumulated over a head, is `rule` here:
the density says how much is kept. An image is one frame: there the 1-D partition keeps everything.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from pointillist.accel.blocks import Blocks, block_means
from pointillist.accel.orders import places_of
from pointillist.accel.patterns.choose import choose
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range
from pointillist.accel.tiles import Grid
from pointillist.kernels import uniform_bounds

PARTITIONS = ("frames", "columns", "boxes")
RULES = ("head", "mass", "row")


class Chunks(NamedTuple):
    """A partition of the video's keys, and the query blocks that lie within its chunks."""

    queries: Blocks
    keys: Blocks
    own: torch.Tensor
    """bool [query blocks, chunks]: the chunk that a query block is a piece of."""


@dataclass(frozen=True)
class Moba(Pattern):
    density: float
    rule: str = "head"
    """How a head's budget is shared among its query blocks, `head`, `mass` or `row`: see `choose.py`."""
    chunk: int = 4
    """A chunk has about so many times `block` tokens; one of frames is at least a frame."""
    partition: str = "cycle"
    """`frames`, `columns`, `boxes`, or `cycle`: these three in turn by layer."""

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_choice("partition", self.partition, ("cycle", *PARTITIONS))
        check_range("chunk", self.chunk, 1, 4096)

    def select(self, call: Call) -> Selection:
        chunks = self.chunks(call)
        gates = block_means(call.video_q, chunks.queries) @ block_means(call.video_k, chunks.keys).mT * call.scale
        mask = self._choose(gates, chunks)
        return Selection(chunks.queries, chunks.keys, mask, mask.numel())

    def chunks(self, call: Call) -> Chunks:
        """The partition of this layer."""
        kind = PARTITIONS[call.layer % 3] if self.partition == "cycle" else self.partition
        return chunks_of(kind, call.grid, call.block, self.chunk * call.block, call.device)

    def inefficiency(self, call: Call) -> float:
        """How many times the token pairs that every token would choose by itself, at the same density, query blocks
        have to compute to cover them all. Waits for the device, and holds a gate for every token and chunk."""
        chunks = self.chunks(call)
        alone = _tokens_alone(chunks)
        q = call.video_q[:, :, chunks.queries.order[0, 0]].to(torch.promote_types(call.q.dtype, torch.float32))
        wanted = self._choose(q @ block_means(call.video_k, chunks.keys).mT * call.scale, alone).float()
        piece = torch.repeat_interleave(chunks.queries.bounds[0, 0].diff().long())
        counts = wanted.new_zeros(*wanted.shape[:2], chunks.queries.count, chunks.keys.count)
        union = (counts.index_add_(2, piece, wanted) > 0).float()
        sizes = chunks.keys.sizes[0, 0]
        return float(((union @ sizes) @ chunks.queries.sizes[0, 0]).sum() / (wanted @ sizes).sum())

    def _choose(self, gates: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        return choose(gates, chunks.queries, chunks.keys, self.density, self.rule, own=chunks.own)


@lru_cache(maxsize=64)
def chunks_of(kind: str, grid: Grid, block: int, tokens: int, device: torch.device) -> Chunks:
    """Chunks of about `tokens` tokens, cut into query blocks of at most `block`; callers share the result."""
    axes = {"frames": (0,), "columns": (1, 2), "boxes": (0, 1, 2)}[kind]
    volume = float(tokens)
    for axis in {0, 1, 2} - set(axes):
        volume /= grid[axis]
    chunk, places = torch.zeros(grid[0] * grid[1] * grid[2], dtype=torch.int64), places_of(grid)
    for axis, parts in zip(axes, parts_of([grid[axis] for axis in axes], volume), strict=True):
        chunk = chunk * parts + places[:, axis] * parts // grid[axis]
    sizes = chunk.bincount()
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    pieces = -(-sizes // block)
    of_piece = torch.repeat_interleave(pieces)  # the chunk of every piece
    number = torch.arange(len(of_piece)) - torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])[of_piece]
    ends = starts[of_piece] + sizes[of_piece] * (number + 1) // pieces[of_piece]
    order, first_frame = chunk.argsort(stable=True)[None, None].to(device), None if grid[0] > 1 else 0
    name = "thw" if kind == "frames" else ""
    queries, keys = (
        Blocks(order, bounds.int()[None, None].to(device), int(bounds.diff().max()), first, even=True, name=name)
        for bounds, first in ((torch.cat([ends.new_zeros(1), ends]), first_frame), (starts, None))
    )
    return Chunks(queries, keys, (of_piece[:, None] == torch.arange(len(sizes))).to(device))


def parts_of(lengths: list[int], volume: float) -> list[int]:
    """How many parts, two or more, to cut every axis into, so that they are near-cubic and of about `volume` each."""
    parts = [1] * len(lengths)
    for done, axis in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        side = max(volume, 1.0) ** (1 / (len(lengths) - done))
        parts[axis] = max(min(2, lengths[axis]), min(lengths[axis], round(lengths[axis] / side)))
        volume *= parts[axis] / lengths[axis]
    return parts


def _tokens_alone(chunks: Chunks) -> Chunks:
    """The same chunks, every query token a block."""
    order, device = chunks.queries.order, chunks.queries.order.device
    own = chunks.own.repeat_interleave(chunks.queries.bounds[0, 0].diff().long(), dim=0)
    return Chunks(Blocks(order, uniform_bounds(order.shape[-1], 1, device)[None, None], 1), chunks.keys, own)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Moba)
