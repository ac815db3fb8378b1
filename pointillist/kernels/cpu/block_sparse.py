"""Block-sparse attention on CPUs: gather the kept keys of a query block, then one flash-attention call.

A task is a few query blocks of one head. Tasks run on a pool of threads, each of which computes alone: a
parallel region per small call would spend its time at barriers (4 to 15 times slower than dense, measured).
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import in_order

QUERY_BLOCKS_PER_TASK = 4

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`; lse is float32."""
    batch, heads, q_len, head_dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the operator takes no other
    ordered = in_order(q, layout.query_order)
    out = torch.zeros(batch, heads, q_len, head_dim, dtype=q.dtype)
    lse = torch.full((batch, heads, q_len), float("-inf"))
    query_bounds, columns = layout.query_bounds.tolist(), layout.columns.tolist()
    indptr = layout.indptr.expand(batch, heads, -1).tolist()
    keys = _valid_keys(k, v, layout)

    @torch.inference_mode()
    def attend(b: int, h: int, first: int, last: int) -> None:
        head, row = keys[b][h], indptr[b][h]
        for block in range(first, last):
            ranges = head.token_ranges(columns[row[block] : row[block + 1]])
            if not ranges:
                continue
            places = slice(query_bounds[block], query_bounds[block + 1])
            kept_k, kept_v = _gather(head.k, ranges), _gather(head.v, ranges)
            query = ordered[b : b + 1, h : h + 1, places]
            block_out, block_lse = _flash(query, kept_k[None, None], kept_v[None, None], 0.0, False, scale=scale)[:2]
            out[b, h, places] = block_out[0, 0]
            lse[b, h, places] = block_lse[0, 0]

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

    k: torch.Tensor
    v: torch.Tensor
    bounds: list[int]

    def token_ranges(self, blocks: list[int]) -> list[tuple[int, int]]:
        """The places of `blocks` (ascending), with neighbours joined and empty blocks left out."""
        ranges: list[tuple[int, int]] = []
        for block in blocks:
            start, stop = self.bounds[block], self.bounds[block + 1]
            if start == stop:
                continue
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        return ranges


def _valid_keys(k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> list[list[_Keys]]:
    batch, heads = k.shape[:2]
    bounds = layout.key_bounds.tolist()
    k, v = in_order(k, layout.key_order), in_order(v, layout.key_order)
    if layout.key_lengths is None:
        return [[_Keys(k[b, h], v[b, h], bounds) for h in range(heads)] for b in range(batch)]
    tokens = torch.arange(layout.k_len)[None, None] if layout.key_order is None else layout.key_order
    valid = (tokens < layout.key_lengths[:, None, None]).expand(batch, heads, -1)
    before = torch.nn.functional.pad(valid.cumsum(-1), (1, 0))[..., layout.key_bounds.long()]
    return [
        [_Keys(k[b, h][valid[b, h]], v[b, h][valid[b, h]], before[b, h].tolist()) for h in range(heads)]
        for b in range(batch)
    ]


def _gather(x: torch.Tensor, ranges: list[tuple[int, int]]) -> torch.Tensor:
    if len(ranges) == 1:
        return x[ranges[0][0] : ranges[0][1]]
    return torch.cat([x[start:stop] for start, stop in ranges])


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
