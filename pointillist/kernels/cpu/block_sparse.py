"""Block-sparse attention on CPUs: gather the kept keys of query blocks, then one flash-attention call.

A task is a few query blocks of one head; if they are equally large and see equally many keys, they are one batch.
Tasks run on a pool of threads, each of which computes alone: a parallel region per small call would spend its time
at barriers (4 to 15 times slower than dense, measured).
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch

from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import in_order

QUERY_BLOCKS_PER_TASK = 8

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`; lse is float32."""
    batch, heads, q_len, head_dim = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()  # the operator takes no other
    ordered = in_order(q, layout.query_order)
    out = torch.zeros(batch, heads, q_len, head_dim, dtype=q.dtype)
    lse = torch.full((batch, heads, q_len), float("-inf"))
    query_bounds = layout.query_bounds.tolist()
    indptr = layout.indptr.expand(batch, heads, -1).tolist()
    heads_of_keys = _valid_keys(k, v, layout)

    @torch.inference_mode()
    def attend(b: int, h: int, first: int, last: int) -> None:
        rows = indptr[b][h][first : last + 1]
        kept, counts = heads_of_keys[b][h].gather(layout.columns[rows[0] : rows[-1]], [r - rows[0] for r in rows])
        bounds = query_bounds[first : last + 1]
        sizes = {stop - start for start, stop in pairwise(bounds)}
        alike = len(sizes) == 1 and len(set(counts)) == 1
        done = 0
        for start, stop, count in (
            [(bounds[0], bounds[-1], len(kept))] if alike else zip(bounds[:-1], bounds[1:], counts, strict=True)
        ):
            keys, done = kept[done : done + count], done + count
            if count == 0 or start == stop:
                continue
            blocks = len(counts) if alike else 1
            query = ordered[b, h, start:stop].unflatten(0, (blocks, 1, -1))
            key, value = keys.unflatten(0, (blocks, 1, -1)).split(head_dim, dim=-1)
            block_out, block_lse = _flash(query, key, value, 0.0, False, scale=scale)[:2]
            out[b, h, start:stop] = block_out.reshape(stop - start, head_dim)
            lse[b, h, start:stop] = block_lse.reshape(stop - start)

    step = QUERY_BLOCKS_PER_TASK
    rows = range(0, layout.query_blocks, step)
    tasks = [(b, h, i, min(i + step, layout.query_blocks)) for b in range(batch) for h in range(heads) for i in rows]
    _run(attend, tasks)
    if layout.query_order is None:
        return out, lse
    order = layout.query_order.expand(batch, heads, -1)
    return (
        torch.empty_like(out).scatter_(2, order[..., None].expand_as(out), out)
        if layout.query_order.shape[:2] != (1, 1)
        else torch.empty_like(out).index_copy_(2, layout.query_order[0, 0], out),
        torch.empty_like(lse).scatter_(2, order, lse),
    )


@dataclass(frozen=True)
class _Keys:
    """The valid keys and values of one head in block order, and where each block lies."""

    keys_values: torch.Tensor
    """[S, 2 D]: a key and its value beside each other, so that they are gathered together."""
    bounds: torch.Tensor
    """int64 [n+1]."""

    def gather(self, columns: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, list[int]]:
        """The tokens of the blocks `columns`, one after the other, and how many there are in each row of them."""
        first = self.bounds[columns]
        sizes = self.bounds[columns + 1] - first
        ends = sizes.cumsum(0)
        total = int(ends[-1]) if len(columns) else 0
        shift = (first - ends + sizes).repeat_interleave(sizes, output_size=total)
        tokens = self.keys_values.index_select(0, torch.arange(total) + shift)
        until = [0, *ends.tolist()]
        return tokens, [until[stop] - until[start] for start, stop in pairwise(rows)]


def _valid_keys(k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> list[list[_Keys]]:
    batch, heads = k.shape[:2]
    bounds = layout.key_bounds.long()
    keys_values = in_order(torch.cat([k, v], dim=-1), layout.key_order)
    if layout.key_lengths is None:
        return [[_Keys(keys_values[b, h], bounds) for h in range(heads)] for b in range(batch)]
    tokens = torch.arange(layout.k_len)[None, None] if layout.key_order is None else layout.key_order
    valid = (tokens < layout.key_lengths[:, None, None]).expand(batch, heads, -1)
    before = torch.nn.functional.pad(valid.cumsum(-1), (1, 0))[..., bounds]
    return [[_Keys(keys_values[b, h][valid[b, h]], before[b, h]) for h in range(heads)] for b in range(batch)]


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
