"""Block-sparse attention by torch's operators, where no compiled kernel serves: gather the kept keys of query
blocks, then one flash-attention call.

A pooled tail costs no second pass: the means of dropped blocks are gathered beside the kept keys, with a logit bias.

A task is a few query blocks of one head; neighbours that are equally large and see equally many keys are one batch.
Tasks run on a pool of threads, each of which computes alone: a parallel region per small call would spend its time
at barriers (4 to 15 times slower than dense, measured).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise

import torch

from pointillist.kernels.cpu.threads import thread_pool
from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import Means, in_order, restore_order, valid_places

QUERY_BLOCKS_PER_TASK = 8
GATHERED_BYTES = 2**22
"""Keys and values gathered at a time, if one query block does not need more."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float,
    means: Means | None = None,
    query_blocks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.attention`; lse is float32."""
    batch, heads, q_len, head_dim = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()  # the operator takes no other
    ordered = in_order(q, layout.query_order)
    out = torch.zeros(batch, heads, q_len, head_dim, dtype=q.dtype)
    lse = torch.full((batch, heads, q_len), float("-inf"))
    query_bounds = layout.query_bounds.expand(batch, heads, -1).tolist()
    indptr = layout.indptr.expand(batch, heads, -1).tolist()
    seen = None if means is None else means.pairs & means.log_counts.isfinite()[:, :, None]
    seen = None if seen is None else seen.expand(batch, heads, -1, -1)
    heads_of_keys = _keys_of(k, v, layout, means)

    @torch.inference_mode()
    def attend(b: int, h: int, first: int, last: int) -> None:
        head, rows = heads_of_keys[b][h], indptr[b][h][first : last + 1]
        kept = head.kept(layout.columns[rows[0] : rows[-1]], [row - rows[0] for row in rows])
        tail = head.means(None if seen is None else seen[b, h, first:last], last - first)
        bounds = query_bounds[b][h][first : last + 1]
        sizes = (stop - start for start, stop in pairwise(bounds))
        shapes = list(zip(sizes, map(len, kept), map(len, tail), strict=True))
        for alike in _batches(shapes, head.bytes_per_key):
            (size, keys, tail_keys) = shapes[alike[0]]
            start, stop = bounds[alike[0]], bounds[alike[-1] + 1]
            if size == 0 or keys + tail_keys == 0:
                continue
            query = ordered[b, h, start:stop].unflatten(0, (len(alike), 1, size))
            some_kept, some_means = (torch.stack([each[i] for i in alike]) for each in (kept, tail))
            key, value, bias = head.gather(some_kept, some_means, size)
            block_out, block_lse = _flash(query, key, value, 0.0, False, attn_mask=bias, scale=scale)[:2]
            out[b, h, start:stop] = block_out.reshape(stop - start, head_dim)
            lse[b, h, start:stop] = block_lse.reshape(stop - start)

    runs = _runs(range(layout.query_blocks) if query_blocks is None else sorted(set(query_blocks.tolist())))
    _run(attend, [(b, h, *run) for b in range(batch) for h in range(heads) for run in runs])
    return restore_order(out, layout.query_order), restore_order(lse[..., None], layout.query_order)[..., 0]


def _batches(shapes: list[tuple[int, int, int]], bytes_per_key: int) -> Iterator[Sequence[int]]:
    """Runs of neighbours with equal shapes (queries, keys, means), their gathered keys no larger than a cache."""
    for (_, keys, means), run in groupby(range(len(shapes)), shapes.__getitem__):
        at_once = max(1, GATHERED_BYTES // max(1, (keys + means) * bytes_per_key))
        while batch := list(islice(run, at_once)):
            yield batch


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """`blocks`, ascending, as runs of neighbours: (first, behind the last), none longer than a task."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block and block - runs[-1][0] < QUERY_BLOCKS_PER_TASK:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


@dataclass(frozen=True)
class _Keys:
    """The valid keys and values of one head in place order, then the means if there are any."""

    keys_values: torch.Tensor
    """[S (+ n), 2 D]: a key and its value beside each other, so that they are gathered together."""
    bounds: torch.Tensor
    """int64 [n+1]."""
    log_counts: torch.Tensor
    """[n], float32 or wider: what a mean's logit is raised by."""

    @property
    def bytes_per_key(self) -> int:
        return self.keys_values.shape[1] * self.keys_values.element_size()

    def kept(self, columns: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, ...]:
        """The tokens of the blocks `columns`, for each row of them."""
        first = self.bounds[columns]
        sizes = self.bounds[columns + 1] - first
        ends = sizes.cumsum(0)
        total = int(ends[-1]) if len(columns) else 0
        shift = (first - ends + sizes).repeat_interleave(sizes, output_size=total)
        until = [0, *ends.tolist()]
        return (torch.arange(total) + shift).split([until[stop] - until[start] for start, stop in pairwise(rows)])

    def means(self, seen: torch.Tensor | None, rows: int) -> tuple[torch.Tensor, ...]:
        """The means that each row of `seen` [rows, n] names."""
        if seen is None:
            return (torch.empty(0, dtype=torch.int64),) * rows
        return seen.nonzero()[:, 1].split(seen.sum(-1).tolist())

    def gather(
        self, kept: torch.Tensor, means: torch.Tensor, queries: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values [blocks, 1, n, D], and the logit bias [blocks, 1, queries, n] if there are means."""
        tokens = torch.cat([kept, means + int(self.bounds[-1])], dim=1)
        found = self.keys_values.index_select(0, tokens.flatten()).unflatten(0, (-1, 1, tokens.shape[1]))
        key, value = found.chunk(2, dim=-1)
        if means.shape[1] == 0:
            return key, value, None
        bias = torch.cat([self.log_counts.new_zeros(kept.shape), self.log_counts[means]], dim=1)
        return key, value, bias[:, None, None].expand(-1, -1, queries, -1)


def _keys_of(k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, means: Means | None) -> list[list[_Keys]]:
    batch, heads = k.shape[:2]
    bounds = layout.key_bounds.long().expand(batch, heads, -1)
    keys_values = in_order(torch.cat([k, v], dim=-1), layout.key_order)
    rest, log_counts = keys_values[:, :, :0], torch.empty(batch, heads, 0)
    if means is not None:
        rest = torch.cat([means.keys, means.values], dim=-1)
        # the operator misreads a float32 bias for float64
        log_counts = means.log_counts.to(torch.promote_types(k.dtype, torch.float32)).expand(batch, heads, -1)
    valid = valid_places(layout.k_len, layout.key_lengths, layout.key_order, k.device)
    if valid is None:
        both = keys_values if means is None else torch.cat([keys_values, rest], dim=2)
        return [[_Keys(both[b, h], bounds[b, h], log_counts[b, h]) for h in range(heads)] for b in range(batch)]
    valid = valid.expand(batch, heads, -1)
    before = torch.nn.functional.pad(valid.cumsum(-1), (1, 0)).gather(-1, bounds)
    return [
        [
            _Keys(torch.cat([keys_values[b, h][valid[b, h]], rest[b, h]]), before[b, h], log_counts[b, h])
            for h in range(heads)
        ]
        for b in range(batch)
    ]


def _run(task, arguments: list[tuple]) -> None:
    """Call `task` with every tuple of arguments, on as many threads as torch may use."""
    threads = torch.get_num_threads()
    if threads == 1:
        for each in arguments:
            task(*each)
        return
    futures = [thread_pool(threads).submit(task, *each) for each in arguments]
    for future in futures:
        future.result()
