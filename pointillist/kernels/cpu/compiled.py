"""A call of the compiled kernel: tensors become addresses and strides, every thread makes the same one call."""

import ctypes
from collections.abc import Callable

import torch

from pointillist.kernels.cpu.threads import thread_pool
from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import Means, valid_places

MAX_HEAD_DIM = 256
KINDS = (torch.float32, torch.float16, torch.bfloat16)
"""As `Kind` in block_sparse.cpp numbers them."""
PANEL = 32
"""A multiple of the keys, and of the channels, that the kernel packs beside each other, whatever the machine."""


class _View(ctypes.Structure):
    """A tensor [B, H, n, …] by its address and strides in elements; without an address, none was given."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64),
    )  # fmt: skip


class _Call(ctypes.Structure):
    """The same fields as `Call` in block_sparse.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "kind", "batch", "heads", "head_dim", "query_blocks", "max_query_block", "max_keys", "means",
        )),
        ("scale", ctypes.c_double),
        *((name, _View) for name in (
            "q", "k", "v", "out", "lse", "query_bounds", "key_bounds", "indptr", "columns", "query_order", "key_order",
            "chosen", "mean_keys", "mean_values", "log_counts", "pairs", "packed_keys", "packed_values",
        )),
        *((name, ctypes.c_int64) for name in ("next_part", "packed_parts", "next_task")),
    )  # fmt: skip


def serves(q: torch.Tensor) -> bool:
    """Whether the kernel computes such a call; float64 would lose digits."""
    return q.dtype in KINDS and q.shape[-1] <= MAX_HEAD_DIM


def attention(
    library: ctypes.CDLL,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float,
    means: Means | None = None,
    query_blocks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.attention`; computed in float32, lse is float32."""
    batch, heads, q_len, head_dim = q.shape
    out = torch.empty(batch, heads, q_len, head_dim)
    lse = torch.empty(batch, heads, q_len)
    key_bounds, key_order = _valid_keys(layout, batch, heads)
    places, channels = _rounded_up(layout.k_len), _rounded_up(head_dim)
    tensors: dict[str, torch.Tensor | None] = dict(
        q=q, k=k, v=v, out=out, lse=lse, query_bounds=layout.query_bounds,
        key_bounds=key_bounds, indptr=layout.indptr, query_order=_int64(layout.query_order),
        key_order=_int64(key_order),
        packed_keys=torch.empty(batch, heads, head_dim, places),
        packed_values=torch.empty(batch, heads, channels, places),
    )  # fmt: skip
    if means is not None:
        tensors |= dict(mean_keys=means.keys, mean_values=means.values)
        tensors |= dict(log_counts=means.log_counts.float(), pairs=means.pairs)
    given = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in tensors.items() if x is not None}
    views = {name: _view(x, batch, heads) for name, x in given.items()}
    columns = layout.columns.contiguous()
    chosen = None if query_blocks is None else _marked(query_blocks, layout.query_blocks)
    call = _Call(
        kind=KINDS.index(q.dtype), batch=batch, heads=heads, head_dim=head_dim, query_blocks=layout.query_blocks,
        max_query_block=layout.max_query_block, max_keys=layout.k_len,
        means=0 if means is None else means.keys.shape[2], scale=scale, columns=_View(columns.data_ptr()),
        chosen=_View(None if chosen is None else chosen.data_ptr()), **views,
    )  # fmt: skip
    if any(_on_every_thread(lambda: library.pointillist_attention(ctypes.byref(call)))):
        raise MemoryError("not enough memory for block-sparse attention")
    return out.to(q.dtype), lse


def _valid_keys(layout: BlockLayout, batch: int, heads: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bounds and order of the keys that are no padding: the order starts with them."""
    valid = valid_places(layout.k_len, layout.key_lengths, layout.key_order, layout.device)
    if valid is None:
        return layout.key_bounds, layout.key_order
    before = torch.nn.functional.pad(valid.cumsum(-1, dtype=torch.int32), (1, 0))
    size = tuple(map(max, zip(before.shape[:2], layout.key_bounds.shape[:2], strict=True)))
    bounds = before.expand(*size, -1).gather(-1, layout.key_bounds.long().expand(*size, -1))
    if layout.key_order is None:
        return bounds, None
    valid_first = (~valid).byte().argsort(dim=-1, stable=True)
    return bounds, layout.key_order.expand(*valid_first.shape).gather(-1, valid_first)


def _int64(order: torch.Tensor | None) -> torch.Tensor | None:
    return None if order is None else order.long()


def _view(x: torch.Tensor, batch: int, heads: int) -> _View:
    """Of a tensor [B|1, H|1, n, …] for every head."""
    x = x.expand(batch, heads, *x.shape[2:])
    return _View(x.data_ptr(), *x.stride()[:3])


def _marked(numbers: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, numbers, True)


def _rounded_up(size: int) -> int:
    return -(-size // PANEL) * PANEL


def _on_every_thread(call: Callable[[], int]) -> list[int]:
    """What `call` returns on this thread and on the others that are free: each takes from the same counters."""
    threads = torch.get_num_threads()
    others = [thread_pool(threads).submit(call) for _ in range(threads - 1)]
    results = [call()]
    return results + [other.result() for other in others if not other.cancel()]
