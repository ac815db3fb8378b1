"""What each program computes, in which order: tables made on the device, without waiting for it.

A program is a tile of queries of one head. Tiles with the longest key lists come first, so that no head whose
density is above the others' is left to finish alone (longest processing time first).
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary

from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.triton import on_device


@dataclass(frozen=True)
class Work:
    """The tables that `block_sparse.forward` reads."""

    table: torch.Tensor
    """int32 [6, programs]: batch · heads + head, first place, place after the last, first and last entry of the key
    list, query block. Unused programs have no places."""
    keys: torch.Tensor
    """int32: key blocks if `key_block`, else runs of keys, `place << 8 | (length − 1)`."""
    key_block: int
    """Size of the blocks in `keys`; 0 if it holds runs."""

    @property
    def programs(self) -> int:
        return self.table.shape[1]


_made: Any = WeakIdKeyDictionary()
"""Work lists by the layout's `columns`: a static layout pays once, and they go when it goes."""
MAX_PLACES = 2**23
"""A run of keys holds its first place in 23 bits."""


def work_of(
    layout: BlockLayout, batch: int, heads: int, tile_q: int, tile_k: int, query_blocks: torch.Tensor | None = None
) -> Work:
    """The work of a layout for B·H heads in tiles of `tile_q` queries and `tile_k` keys.

    Args:
        query_blocks: int64 [n], the only query blocks to compute; None is all.
    """
    capturing = layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if query_blocks is not None or capturing:  # what is recorded into a graph is not computed yet
        return _make(layout, batch, heads, tile_q, tile_k, query_blocks)
    made = _made.setdefault(layout.columns, {})
    sizes = (layout.q_len, layout.k_len, layout.max_query_block, layout.max_key_block, layout.uniform)
    key = (batch, heads, tile_q, tile_k, *sizes)
    sources = (layout.columns, layout.indptr, layout.query_bounds, layout.key_bounds)
    versions = tuple(0 if x.is_inference() else x._version for x in sources)
    known, at, work = made.get(key, ((), (), None))
    if work is None or at != versions or any(ref() is not x for ref, x in zip(known, sources, strict=True)):
        work = _make(layout, batch, heads, tile_q, tile_k, None)
        made[key] = (tuple(weakref.ref(x) for x in sources), versions, work)
    return work


def _make(
    layout: BlockLayout, batch: int, heads: int, tile_q: int, tile_k: int, query_blocks: torch.Tensor | None
) -> Work:
    begins, ends, keys, key_block = _key_lists(layout, batch, heads, tile_k)
    device, blocks = layout.device, layout.query_blocks
    firsts = layout.query_bounds[..., :-1].expand(batch, heads, -1).reshape(batch * heads, blocks)
    lasts = layout.query_bounds[..., 1:].expand(batch, heads, -1).reshape(batch * heads, blocks)
    chosen = torch.arange(blocks, device=device) if query_blocks is None else query_blocks
    firsts, lasts, begins, ends = (x.index_select(1, chosen) for x in (firsts, lasts, begins, ends))
    tiles = (lasts - firsts + tile_q - 1) // tile_q
    until = tiles.cumsum(1, dtype=torch.int32)
    most = len(chosen) * -(-layout.max_query_block // tile_q)
    if query_blocks is None:  # a list may name a block twice
        most = min(most, blocks + layout.q_len // tile_q)
    slots = torch.arange(most, dtype=torch.int32, device=device).expand(batch * heads, -1).contiguous()
    at = torch.searchsorted(until, slots, right=True)
    used = at < len(chosen)
    at = at.clamp(max=len(chosen) - 1)
    offset = (slots - until.gather(1, at) + tiles.gather(1, at)) * tile_q
    first = firsts.gather(1, at) + offset
    last = torch.minimum(first + tile_q, lasts.gather(1, at))
    begin, end = begins.gather(1, at), ends.gather(1, at)
    head = torch.arange(batch * heads, dtype=torch.int32, device=device)[:, None].expand_as(first)
    last = torch.where(used, last, first)
    end = torch.where(used, end, begin)
    rows = torch.stack([head, first, last, begin, end, chosen[at].int()]).view(6, -1)
    longest_first = (rows[4] - rows[3] + (rows[2] > rows[1]).int()).argsort(descending=True, stable=True)
    return Work(rows[:, longest_first].contiguous(), keys, key_block)


def _key_lists(
    layout: BlockLayout, batch: int, heads: int, tile_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Begin and end of every row's list [B·H, nq], the lists, and the block size if they hold whole blocks."""
    blocks, device = layout.query_blocks, layout.device
    if layout.uniform and layout.max_key_block % tile_k == 0:
        split = layout.max_key_block // tile_k
        begins, ends = (
            (x * split).expand(batch, heads, -1).reshape(batch * heads, blocks)
            for x in (layout.indptr[..., :-1], layout.indptr[..., 1:])
        )
        keys = layout.columns if layout.columns.numel() else layout.columns.new_zeros(1)
        return begins, ends, keys, layout.max_key_block

    if layout.k_len > MAX_PLACES:
        raise ValueError(
            f"{layout.k_len} keys in blocks of unequal size are more than the {MAX_PLACES} that are served"
        )
    own = torch.broadcast_shapes(layout.indptr.shape[:2], layout.key_bounds.shape[:2])
    rows = own[0] * own[1] * blocks
    counts = layout.indptr.diff(dim=-1).expand(*own, -1).reshape(-1)
    pairs = layout.columns.numel() * (own[0] * own[1] // (layout.indptr.shape[0] * layout.indptr.shape[1]))
    # A block makes at most ⌈largest / tile⌉ runs, and a row at most one for each block and each whole tile of keys.
    per_block, per_row = -(-layout.max_key_block // tile_k), layout.k_len // tile_k
    each, extra = (per_block, 0) if pairs * per_block <= pairs + rows * per_row else (1, per_row)
    before = counts.cumsum(0, dtype=torch.int32) - counts
    begins = before * each + torch.arange(rows, dtype=torch.int32, device=device) * extra
    ends = torch.empty_like(begins)
    runs = torch.empty(max(1, pairs * each + rows * extra), dtype=torch.int32, device=device)
    with on_device(runs):
        _runs[(rows,)](
            layout.indptr.expand(*own, -1).contiguous(), layout.columns,
            layout.key_bounds.expand(*own, -1).contiguous(), begins, ends, runs, blocks, layout.key_blocks, TILE=tile_k,
        )  # fmt: skip
    begins, ends = (
        x.view(*own, blocks).expand(batch, heads, -1).reshape(batch * heads, blocks) for x in (begins, ends)
    )
    return begins, ends, runs, 0


@triton.jit
def _runs(INDPTR, COLUMNS, BOUNDS, BEGINS, ENDS, RUNS, blocks, key_blocks, TILE: tl.constexpr):
    """Writes one row's key list: neighbouring blocks are joined, then cut into tiles."""
    row = tl.program_id(0)
    head = row // blocks
    pair = tl.load(INDPTR + row + head)  # every head has one entry more than rows
    last_pair = tl.load(INDPTR + row + head + 1)
    BOUNDS += head.to(tl.int64) * (key_blocks + 1)
    at = tl.load(BEGINS + row)
    while pair < last_pair:
        column = tl.load(COLUMNS + pair)
        start = tl.load(BOUNDS + column)
        pair += 1
        following = tl.load(COLUMNS + pair, mask=pair < last_pair, other=-1)
        while following == column + 1:
            column = following
            pair += 1
            following = tl.load(COLUMNS + pair, mask=pair < last_pair, other=-1)
        stop = tl.load(BOUNDS + column + 1)
        while start < stop:
            length = tl.minimum(stop - start, TILE)
            tl.store(RUNS + at, (start << 8) | (length - 1))
            at += 1
            start += length
    tl.store(ENDS + row, at)
