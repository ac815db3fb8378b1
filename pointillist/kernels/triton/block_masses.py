"""Softmax mass of every pair of blocks in Triton: one more QKᵀ, given the log-sum-exp of dense attention (AdaSpa)."""

import torch
import triton
import triton.language as tl

from pointillist.kernels.triton import on_device
from pointillist.kernels.triton.block_sparse import LOG2_E
from pointillist.kernels.triton.configs import precision_of, small_config


@triton.jit
def masses(
    Q, K, LSE, QUERY_BOUNDS, KEY_BOUNDS, VALID, OUT, scale_log2, heads, q_blocks, k_blocks, q_len,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_ub, stride_uh, stride_wb, stride_wh,
    stride_vb, stride_vh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    QUERY_BOUNDS += b * stride_ub + h * stride_uh + block
    KEY_BOUNDS += b * stride_wb + h * stride_wh
    first, last = tl.load(QUERY_BOUNDS), tl.load(QUERY_BOUNDS + 1)
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    VALID += b * stride_vb + h * stride_vh
    OUT += (head_of_batch * q_blocks + block) * k_blocks
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    for column in range(0, k_blocks):
        key_first, key_last = tl.load(KEY_BOUNDS + column), tl.load(KEY_BOUNDS + column + 1)
        mass = tl.zeros([TILE_Q], tl.float32)
        for row in range(first, last, TILE_Q):
            rows = (row + tl.arange(0, TILE_Q)).to(tl.int64)
            row_ok = rows < last
            q = tl.load(Q + rows[:, None] * stride_qs + dims[None, :], mask=row_ok[:, None] & dim_ok[None, :], other=0)
            lse = tl.load(LSE + head_of_batch * q_len + rows, mask=row_ok, other=float("inf")) * LOG2_E
            for start in range(key_first, key_last, TILE_K):
                keys = (start + tl.arange(0, TILE_K)).to(tl.int64)
                ok = keys < key_last
                if HAS_VALID:
                    ok = ok & (tl.load(VALID + keys, mask=ok, other=0) != 0)
                k = tl.load(K + keys[None, :] * stride_ks + dims[:, None], mask=ok[None, :] & dim_ok[:, None], other=0)
                scores = tl.dot(q, k, input_precision=PRECISION)
                weights = tl.math.exp2(scores * scale_log2 - lse[:, None])
                mass += tl.sum(tl.where(ok[None, :], weights, 0.0), 1)
        share = tl.sum(mass, 0) / tl.maximum(last - first, 1).to(tl.float32)
        tl.store(OUT + column, share)


@torch.library.custom_op("pointillist::block_masses", mutates_args=())
def block_masses(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """See `reference.block_masses`; q, k and lse are in place order, `valid` is bool [B, H|1, Sk]."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    lse = lse.contiguous()
    batch, heads, q_len, head_dim = q.shape
    q_blocks, k_blocks = query_bounds.shape[-1] - 1, key_bounds.shape[-1] - 1
    query_bounds, key_bounds = (x.expand(batch, heads, -1) for x in (query_bounds, key_bounds))
    flags = query_bounds if valid is None else valid.expand(batch, heads, -1)
    out = torch.empty(batch, heads, q_blocks, k_blocks, dtype=torch.float32, device=q.device)
    block_d, config = max(16, triton.next_power_of_2(head_dim)), small_config(head_dim, q.element_size())
    with on_device(out):
        masses[(q_blocks, batch * heads)](
            q, k, lse, query_bounds, key_bounds, flags, out, scale * LOG2_E.value, heads, q_blocks, k_blocks, q_len,
            *q.stride()[:3], *k.stride()[:3], *query_bounds.stride()[:2], *key_bounds.stride()[:2], *flags.stride()[:2],
            HEAD_DIM=head_dim, BLOCK_D=block_d, TILE_Q=config.tile_q, TILE_K=config.tile_k,
            HAS_VALID=valid is not None, PRECISION=precision_of(q.device, head_dim), **config.options(),
        )  # fmt: skip
    return out


@block_masses.register_fake
def _(q, k, lse, query_bounds, key_bounds, valid, scale):
    return q.new_empty(*q.shape[:2], query_bounds.shape[-1] - 1, key_bounds.shape[-1] - 1, dtype=torch.float32)
