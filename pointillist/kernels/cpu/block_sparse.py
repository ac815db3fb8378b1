"""Block-sparse attention on CPUs: gather the kept keys of query blocks, then one flash-attention call.

A pooled tail costs no second pass: the means of dropped blocks are gathered beside the kept keys, with a logit bias.

A task is a few query blocks of one head; neighbours that are equally large and see equally many keys are one batch.
Tasks run on a pool of threads, each of which computes alone: a parallel region per small call would spend its time
at barriers (4 to 15 times slower than dense, measured).
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import dropped_of, in_order, pool_blocks

QUERY_BLOCKS_PER_TASK = 8

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`; lse is float32."""
    return _attention(q, k, v, layout, scale, tail=False)


def attention_with_pooled_tail(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, scale: float
) -> torch.Tensor:
    """See `dispatch.attention_with_pooled_tail`; the means of dropped blocks are keys beside the kept ones."""
    return _attention(q, k, v, layout, scale, tail=True)[0]


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, scale: float, tail: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, q_len, head_dim = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()  # the operator takes no other
    ordered = in_order(q, layout.query_order)
    out = torch.zeros(batch, heads, q_len, head_dim, dtype=q.dtype)
    lse = torch.full((batch, heads, q_len), float("-inf"))
    query_bounds = layout.query_bounds.tolist()
    indptr = layout.indptr.expand(batch, heads, -1).tolist()
    dropped = dropped_of(layout).expand(batch, heads, -1, -1) if tail else None
    heads_of_keys = _keys_of(k, v, layout, tail)

    @torch.inference_mode()
    def attend(b: int, h: int, first: int, last: int) -> None:
        head, rows = heads_of_keys[b][h], indptr[b][h][first : last + 1]
        kept = head.kept(layout.columns[rows[0] : rows[-1]], [row - rows[0] for row in rows])
        means = head.means(None if dropped is None else dropped[b, h, first:last], last - first)
        bounds = query_bounds[first : last + 1]
        sizes = (stop - start for start, stop in pairwise(bounds))
        shapes = list(zip(sizes, map(len, kept), map(len, means), strict=True))
        for (size, keys, tail_keys), run in groupby(range(last - first), shapes.__getitem__):
            alike = list(run)
            start, stop = bounds[alike[0]], bounds[alike[-1] + 1]
            if size == 0 or keys + tail_keys == 0:
                continue
            query = ordered[b, h, start:stop].unflatten(0, (len(alike), 1, size))
            some_kept, some_means = (torch.stack([each[i] for i in alike]) for each in (kept, means))
            key, value, bias = head.gather(some_kept, some_means, size)
            block_out, block_lse = _flash(query, key, value, 0.0, False, attn_mask=bias, scale=scale)[:2]
            out[b, h, start:stop] = block_out.reshape(stop - start, head_dim)
            lse[b, h, start:stop] = block_lse.reshape(stop - start)

    step = QUERY_BLOCKS_PER_TASK
    blocks = range(0, layout.query_blocks, step)
    tasks = [(b, h, i, min(i + step, layout.query_blocks)) for b in range(batch) for h in range(heads) for i in blocks]
    _run(attend, tasks)
    if layout.query_order is None:
        return out, lse
    places = layout.query_order.argsort(-1)
    return in_order(out, places), in_order(lse[..., None], places)[..., 0]


@dataclass(frozen=True)
class _Keys:
    """The valid keys and values of one head in block order, then the means of the blocks if there is a tail."""

    keys_values: torch.Tensor
    """[S (+ n), 2 D]: a key and its value beside each other, so that they are gathered together."""
    bounds: torch.Tensor
    """int64 [n+1]."""
    log_counts: torch.Tensor
    """[n], float32 or wider: what a mean's logit is raised by."""

    def kept(self, columns: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, ...]:
        """The tokens of the blocks `columns`, for each row of them."""
        first = self.bounds[columns]
        sizes = self.bounds[columns + 1] - first
        ends = sizes.cumsum(0)
        total = int(ends[-1]) if len(columns) else 0
        shift = (first - ends + sizes).repeat_interleave(sizes, output_size=total)
        until = [0, *ends.tolist()]
        return (torch.arange(total) + shift).split([until[stop] - until[start] for start, stop in pairwise(rows)])

    def means(self, dropped: torch.Tensor | None, rows: int) -> tuple[torch.Tensor, ...]:
        """The blocks that each row of `dropped` [rows, n] names; none without a tail."""
        if dropped is None:
            return (torch.empty(0, dtype=torch.int64),) * rows
        return dropped.nonzero()[:, 1].split(dropped.sum(-1).tolist())

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


def _keys_of(k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, tail: bool) -> list[list[_Keys]]:
    batch, heads = k.shape[:2]
    bounds = layout.key_bounds.long()
    keys_values = in_order(torch.cat([k, v], dim=-1), layout.key_order)
    means, counts = keys_values[:, :, :0], torch.ones(1, 1, 0)
    if tail:
        means, counts = pool_blocks(keys_values, layout.key_bounds, layout.key_lengths, layout.key_order)
    wide = torch.promote_types(k.dtype, torch.float32)  # the operator misreads a float32 bias for float64
    log_counts = counts.to(wide).log().expand(batch, heads, -1)
    if layout.key_lengths is None:
        both = torch.cat([keys_values, means], dim=2) if tail else keys_values
        return [[_Keys(both[b, h], bounds, log_counts[b, h]) for h in range(heads)] for b in range(batch)]
    tokens = torch.arange(layout.k_len)[None, None] if layout.key_order is None else layout.key_order
    valid = (tokens < layout.key_lengths[:, None, None]).expand(batch, heads, -1)
    before = torch.nn.functional.pad(valid.cumsum(-1), (1, 0))[..., bounds]
    return [
        [
            _Keys(torch.cat([keys_values[b, h][valid[b, h]], means[b, h]]), before[b, h], log_counts[b, h])
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
    futures = [_pool(threads).submit(task, *each) for each in arguments]
    for future in futures:
        future.result()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _pools_lock:
        if threads not in _pools:
            # set_num_threads in a worker also moves the default of threads born later, so all workers are
            # started here and the caller's number is put back.
            gate = threading.Barrier(threads + 1)
            pool = ThreadPoolExecutor(threads, "pointillist", initializer=torch.set_num_threads, initargs=(1,))
            started = [pool.submit(gate.wait) for _ in range(threads)]
            gate.wait()
            for future in started:
                future.result()
            torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]
