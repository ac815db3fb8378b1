"""Block-sparse attention in Triton: one program per query block walks the kept key blocks with an online softmax.

FlashAttention-2's forward pass (Dao 2023, Algorithm 1) over the rows of a `BlockLayout`.
"""

import os

import torch
import triton
import triton.language as tl

from pointillist.kernels.layout import BlockLayout

MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634


@triton.jit
def _forward(
    Q, K, V, OUT, LSE, INDPTR, COLUMNS, QUERY_BOUNDS, KEY_BOUNDS, QUERY_ORDER, KEY_ORDER, KEY_LENGTHS,
    scale_log2, heads, q_len, k_len,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_os, stride_od,
    stride_ib, stride_ih, stride_qob, stride_qoh, stride_kob, stride_koh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_QUERY_ORDER: tl.constexpr, HAS_KEY_ORDER: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tile = tl.program_id(1)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = (tl.program_id(2) % heads).to(tl.int64)
    places = tl.load(QUERY_BOUNDS + block) + tile * TILE_Q + tl.arange(0, TILE_Q)
    row_ok = places < tl.load(QUERY_BOUNDS + block + 1)
    rows = places.to(tl.int64)
    if HAS_QUERY_ORDER:
        rows = tl.load(QUERY_ORDER + b * stride_qob + h * stride_qoh + places, mask=row_ok, other=0)
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    q = tl.load(
        Q + b * stride_qb + h * stride_qh + rows[:, None] * stride_qs + dims[None, :] * stride_qd,
        mask=row_ok[:, None] & dim_ok[None, :],
        other=0.0,
    )
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    valid_keys = k_len
    if HAS_KEY_LENGTHS:
        valid_keys = tl.load(KEY_LENGTHS + b).to(tl.int32)

    highest = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, BLOCK_D], tl.float32)
    INDPTR += b * stride_ib + h * stride_ih + block
    for entry in range(tl.load(INDPTR), tl.load(INDPTR + 1)):
        column = tl.load(COLUMNS + entry)
        first = tl.load(KEY_BOUNDS + column)
        last = tl.load(KEY_BOUNDS + column + 1)
        for start in range(first, last, TILE_K):
            key_places = start + tl.arange(0, TILE_K)
            key_ok = key_places < last
            keys = key_places.to(tl.int64)
            if HAS_KEY_ORDER:
                keys = tl.load(KEY_ORDER + b * stride_kob + h * stride_koh + key_places, mask=key_ok, other=0)
            key_ok = key_ok & (keys < valid_keys)
            k = tl.load(
                K + keys[None, :] * stride_ks + dims[:, None] * stride_kd,
                mask=key_ok[None, :] & dim_ok[:, None],
                other=0.0,
            )
            if IEEE:
                scores = tl.dot(q, k, input_precision="ieee")
            else:
                scores = tl.dot(q, k)
            scores = tl.where(key_ok[None, :], scores * scale_log2, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            # a tile whose every key is forbidden leaves the maximum at −inf, and −inf − −inf is NaN
            anchor = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.math.exp2(scores - anchor[:, None])
            rescale = tl.math.exp2(highest - anchor)
            total = total * rescale + tl.sum(weights, 1)
            v = tl.load(
                V + keys[:, None] * stride_vs + dims[None, :] * stride_vd,
                mask=key_ok[:, None] & dim_ok[None, :],
                other=0.0,
            )
            acc = acc * rescale[:, None]
            if IEEE:
                acc = tl.dot(weights, v, acc, input_precision="ieee")
            else:
                acc = tl.dot(weights.to(v.dtype), v, acc)
            highest = new_highest

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    lse = tl.where(empty, float("-inf"), (highest + tl.math.log2(total)) * 0.6931471805599453)
    tl.store(
        OUT + b * stride_ob + h * stride_oh + rows[:, None] * stride_os + dims[None, :] * stride_od,
        acc.to(OUT.dtype.element_ty),
        mask=row_ok[:, None] & dim_ok[None, :],
    )
    tl.store(LSE + (b * heads + h) * q_len + rows, lse, mask=row_ok)


def interpreting() -> bool:
    """Whether Triton's interpreter, which takes CPU tensors, is on (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`; head dimensions up to 256; lse is float32.

    Raises:
        ValueError: a dtype or head dimension that this kernel does not compute.
    """
    batch, heads, q_len, head_dim = q.shape
    if head_dim > MAX_HEAD_DIM or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"the triton backend computes float16, bfloat16 and float32 up to head dimension {MAX_HEAD_DIM}; "
            f'this is {q.dtype} with {head_dim}: use backend="reference"'
        )
    out = torch.empty(batch, heads, q_len, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    indptr = layout.indptr.expand(batch, heads, -1)
    query_order = q.new_empty(1, 1, 1) if layout.query_order is None else layout.query_order.expand(batch, heads, -1)
    key_order = q.new_empty(1, 1, 1) if layout.key_order is None else layout.key_order.expand(batch, heads, -1)
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = 64 if block_d <= 128 else 32
    grid = (layout.query_blocks, triton.cdiv(layout.max_query_block, tile), batch * heads)
    _forward[grid](
        q, k, v, out, lse, indptr, layout.columns, layout.query_bounds, layout.key_bounds, query_order, key_order,
        q if layout.key_lengths is None else layout.key_lengths,
        scale * LOG2_E, heads, q_len, k.shape[2],
        *q.stride(), *k.stride(), *v.stride(), *out.stride(), *indptr.stride()[:2],
        *query_order.stride()[:2], *key_order.stride()[:2],
        HEAD_DIM=head_dim, BLOCK_D=block_d, TILE_Q=tile, TILE_K=tile,
        HAS_QUERY_ORDER=layout.query_order is not None, HAS_KEY_ORDER=layout.key_order is not None,
        HAS_KEY_LENGTHS=layout.key_lengths is not None, IEEE=q.dtype == torch.float32,
        num_warps=8 if block_d >= 128 else 4, num_stages=2,
    )  # fmt: skip
    return out, lse
