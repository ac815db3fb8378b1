"""Attention in a ring: this process's queries over the keys of one process after the other, merged exactly.

A pattern that looks only at the grid gives a layout of all tokens on every process. A process computes of it the rows
of its own queries and, for each other one, the columns of that one's keys: blocks keep their members and the pairs
they are kept with, so some are smaller in a part, or empty. Outputs of parts are merged by their log-sum-exps. The
means that stand for dropped blocks are those of whole blocks: their sums go around once, before the keys.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from pointillist.accel.layouts import Laid
from pointillist.accel.parallel import engine
from pointillist.accel.parallel.errors import ParallelError
from pointillist.accel.parallel.tokens import tokens_of_ring_rank
from pointillist.accel.patterns.pattern import Call
from pointillist.accel.sequence import Sequence
from pointillist.kernels import (
    BlockLayout,
    block_sparse_attention,
    dropped_of,
    merge_attention,
    pool_blocks,
    pooled_attention,
)
from pointillist.kernels.pooling import in_order, restore_order

DENSE_BLOCK = 256
LEAST = -1e4
"""The log-sum-exp of a row that sees no key of a part: minus infinity would make the merged output NaN."""


class Ring:
    """Of one attention call."""

    def __init__(self, config: Any, lengths: tuple[int, ...]) -> None:
        """`lengths`: tokens of all streams of the whole sequence."""
        self._config, self._lengths = config, lengths
        self.tokens = sum(lengths)

    def whole_shape(self, x: torch.Tensor) -> torch.Tensor:
        """Nothing, in the shape of all tokens of x [B, n, H, D]."""
        return x.new_empty(x.shape[0], self.tokens, x.shape[2], 0)

    def dense(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        backend: str,
        mask: torch.Tensor | None,
        lies: Sequence | None,
    ) -> torch.Tensor:
        """Of all pairs but those with padding; q, k, v and the output are [B, n, H, D]. Raises ParallelError for a mask
        that says something else than which keys at the end are padding."""
        if mask is not None and (lies is None or lies.order is not None):
            raise ParallelError(
                f"attention has a mask {list(mask.shape)}, of which a ring knows only padding at the end; take ulysses "
                "alone"
            )
        key_lengths = None if lies is None else lies.key_lengths

        def attend(rank: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            k, v, own_lengths = self._keys(rank, k, v, key_lengths)
            pairs = torch.ones(1, 1, -(-q.shape[1] // DENSE_BLOCK), 1, dtype=torch.bool, device=q.device)
            layout = BlockLayout.from_mask(
                pairs, DENSE_BLOCK, k.shape[1], q.shape[1], k.shape[1], pairs=pairs.numel(), key_lengths=own_lengths
            )
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return _given(*block_sparse_attention(q, k, v, layout, scale, return_lse=True, backend=backend))

        return engine.around_the_ring(q, k, v, self._config, attend)

    def sparse(self, call: Call, laid: Laid, tail: str) -> torch.Tensor:
        """The kept pairs of a layout of all tokens, with the tail `none` or `pooled`; q of the call and the output are
        [B, H, n, D]."""
        mine = engine.places(self._config)[1]

        def attend(rank: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            k, v, own_lengths = self._keys(rank, k, v, laid.layout.key_lengths)
            part = replace(self._part(call, laid, mine, rank), key_lengths=own_lengths)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out, lse = block_sparse_attention(q, k, v, part, call.scale, return_lse=True, backend=call.backend)
            if tail == "pooled" and rank == mine:
                out, lse = merge_attention(out, lse, *self._tail(call, laid, part, q, k, v))
            return _given(out, lse)

        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        return engine.around_the_ring(q, k, v, self._config, attend).transpose(1, 2)

    def _tail(
        self, call: Call, laid: Laid, part: BlockLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of these queries over the means of all dropped blocks; k and v are this process's."""
        found = []
        for x in (k, v):
            means, counts = pool_blocks(
                in_order(x, part.key_order).float(), part.key_bounds, part.key_lengths, part.key_order
            )
            counts = counts.expand(means.shape[:3])[..., None]
            sums = torch.cat([means * counts, counts], dim=-1)
            sums = sums.contiguous()
            with engine.telling():
                dist.all_reduce(sums, group=engine.process_group(self._config, "ring"))
            found.append((sums[..., :-1] / sums[..., -1:].clamp(min=1)).to(x.dtype))
        log_counts = sums[..., -1].log()
        pairs = dropped_of(laid.layout)
        for group, selection in laid.parts:
            if not selection.tail:
                pairs = pairs.expand(-1, q.shape[1], -1, -1).clone()
                pairs[:, slice(None) if group.heads is None else group.index(q.device)] = False
        out, lse = pooled_attention(
            in_order(q, part.query_order), found[0], found[1], log_counts, pairs=pairs,
            query_bounds=part.query_bounds, scale=call.scale, backend=call.backend,
        )  # fmt: skip
        return restore_order(out, part.query_order), restore_order(lse[..., None], part.query_order)[..., 0]

    def _keys(
        self, rank: int, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of a place in the ring with their tokens ascending, so that padding is the end, and how many
        of each batch entry are none."""
        tokens = self._tokens(rank, k.device)
        if len(self._lengths) > 1:
            k, v = (x.index_select(1, tokens.argsort()) for x in (k, v))
        return k, v, None if lengths is None else (tokens < lengths[:, None]).sum(1)

    def _part(self, call: Call, laid: Laid, rows: int, columns: int) -> BlockLayout:
        """Of the layout, the queries of one place in the ring and the keys of another."""
        known, part = call.memory.get(("part", columns), (None, None))
        if known is not laid.layout:
            keys = self._tokens(columns, call.device).sort().values
            part = part_of(laid.layout, self._tokens(rows, call.device), keys)
            call.memory["part", columns] = (laid.layout, part)
        return part

    def _tokens(self, place: int, device: torch.device) -> torch.Tensor:
        return tokens_of_ring_rank(self._lengths, *engine.degrees(self._config), place, device)


def part_of(layout: BlockLayout, queries: torch.Tensor, keys: torch.Tensor) -> BlockLayout:
    """The layout of some queries and some keys, int64 [n] tokens in the order in which they lie in q and in k."""
    query_order, query_bounds = _restricted(layout.query_order, layout.query_bounds, queries, layout.q_len)
    key_order, key_bounds = _restricted(layout.key_order, layout.key_bounds, keys, layout.k_len)
    return BlockLayout.from_bounds(
        layout.mask(), query_bounds, key_bounds, len(queries), len(keys), max_query_block=layout.max_query_block,
        max_key_block=layout.max_key_block, pairs=layout.columns.numel(), query_order=query_order, key_order=key_order,
    )  # fmt: skip


def _restricted(
    order: torch.Tensor | None, bounds: torch.Tensor, tokens: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and bounds of the blocks' members that are among `tokens`, by their places there."""
    if order is None:
        order = torch.arange(length, device=tokens.device)[None, None]
    place = torch.full((length,), -1, device=tokens.device).scatter_(
        0, tokens, torch.arange(len(tokens), device=tokens.device)
    )
    here = place[order]
    shape = torch.broadcast_shapes(order.shape[:2], bounds.shape[:2])
    before = torch.nn.functional.pad((here >= 0).cumsum(-1), (1, 0)).expand(*shape, -1)
    new_bounds = before.gather(-1, bounds.long().expand(*shape, -1)).int()
    return here[here >= 0].view(*order.shape[:2], len(tokens)), new_bounds


def _given(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As Diffusers merges them: [B, S, H, D] and [B, S, H]."""
    return out.transpose(1, 2), lse.transpose(1, 2).clamp(min=LEAST)
