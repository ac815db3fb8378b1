"""Linear attention over block pairs in Triton (SLA, section 4): the two passes over tokens.

Each key block has a state, Σ φ(k) vᵀ and Σ φ(k); a query block reads the sum of the states that it sees, which is one
matrix product outside of this file.
"""

import torch
import triton
import triton.language as tl

from pointillist.kernels.triton import on_device
from pointillist.kernels.triton.configs import precision_of

TILE = 32
"""Tokens at a time."""


def width_of(features: int) -> int:
    """Columns of v in one program."""
    return 64 if features <= 128 else 16


@triton.jit
def block_states(
    K, V, BOUNDS, VALID, STATES, NORMS, blocks, heads, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bb, stride_bh, stride_xb, stride_xh,
    FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    BOUNDS += b * stride_bb + h * stride_bh + block
    first, last = tl.load(BOUNDS), tl.load(BOUNDS + 1)
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    VALID += b * stride_xb + h * stride_xh
    features = tl.arange(0, BLOCK_F)
    dims = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    norm = tl.zeros([BLOCK_F], tl.float32)
    for start in range(first, last, TILE):
        places = (start + tl.arange(0, TILE)).to(tl.int64)
        ok = places < last
        if HAS_VALID:
            ok = ok & (tl.load(VALID + places, mask=ok, other=0) != 0)
        k_mask = ok[None, :] & (features < FEATURES)[:, None]
        k = tl.load(K + places[None, :] * stride_ks + features[:, None], mask=k_mask, other=0.0)
        v_mask = ok[:, None] & (dims < HEAD_DIM)[None, :]
        v = tl.load(V + places[:, None] * stride_vs + dims[None, :], mask=v_mask, other=0.0)
        state = tl.dot(k, v, state, input_precision=PRECISION)
        norm += tl.sum(k.to(tl.float32), 1)
    at = head_of_batch * blocks + block
    inside = (features < FEATURES)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(STATES + (at * FEATURES + features[:, None]) * HEAD_DIM + dims[None, :], state, mask=inside)
    if tl.program_id(2) == 0:
        tl.store(NORMS + at * FEATURES + features, norm, mask=features < FEATURES)


@triton.jit
def apply_states(
    Q, STATES, NORMS, BOUNDS, OUT, blocks, heads, stride_qb, stride_qh, stride_qs, stride_ob, stride_oh, stride_os,
    stride_bb, stride_bh,
    FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    BOUNDS += b * stride_bb + h * stride_bh + block
    first, last = tl.load(BOUNDS), tl.load(BOUNDS + 1)
    features = tl.arange(0, BLOCK_F)
    dims = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    feature_ok, dim_ok = features < FEATURES, dims < HEAD_DIM
    at = head_of_batch * blocks + block
    state = tl.load(
        STATES + (at * FEATURES + features[:, None]) * HEAD_DIM + dims[None, :],
        mask=feature_ok[:, None] & dim_ok[None, :],
        other=0.0,
    )
    norm = tl.load(NORMS + at * FEATURES + features, mask=feature_ok, other=0.0)
    for start in range(first, last, TILE):
        places = (start + tl.arange(0, TILE)).to(tl.int64)
        ok = places < last
        q = tl.load(
            Q + b * stride_qb + h * stride_qh + places[:, None] * stride_qs + features[None, :],
            mask=ok[:, None] & feature_ok[None, :],
            other=0.0,
        )
        total = tl.sum(q.to(tl.float32) * norm[None, :], 1)
        out = tl.dot(q.to(tl.float32), state, input_precision=PRECISION) / tl.where(total == 0.0, 1.0, total)[:, None]
        out = tl.where(total[:, None] == 0.0, 0.0, out)
        tl.store(
            OUT + b * stride_ob + h * stride_oh + places[:, None] * stride_os + dims[None, :],
            out.to(OUT.dtype.element_ty),
            mask=ok[:, None] & dim_ok[None, :],
        )


@torch.library.custom_op("pointillist::block_states", mutates_args=())
def states_of(
    k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [B, H, n, F, D] and norms [B, H, n, F], float32, of features k [B, H, S, F] and values v [B, H, S, D]."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k.to(v.dtype), v))
    batch, heads, _, features = k.shape
    blocks, head_dim = bounds.shape[-1] - 1, v.shape[-1]
    bounds = bounds.expand(batch, heads, -1)
    flags = bounds if valid is None else valid.expand(batch, heads, -1)
    states = torch.empty(batch, heads, blocks, features, head_dim, dtype=torch.float32, device=k.device)
    norms = torch.empty(batch, heads, blocks, features, dtype=torch.float32, device=k.device)
    with on_device(states):
        block_states[(blocks, batch * heads, triton.cdiv(head_dim, width_of(features)))](
            k, v, bounds, flags, states, norms, blocks, heads, *k.stride()[:3], *v.stride()[:3], *bounds.stride()[:2],
            *flags.stride()[:2], FEATURES=features, BLOCK_F=max(16, triton.next_power_of_2(features)),
            HEAD_DIM=head_dim,
            BLOCK_V=width_of(features), TILE=TILE, HAS_VALID=valid is not None,
            PRECISION=precision_of(k.device, features), num_warps=8, num_stages=1,
        )  # fmt: skip
    return states, norms


@torch.library.custom_op("pointillist::apply_states", mutates_args=())
def apply(
    q: torch.Tensor, states: torch.Tensor, norms: torch.Tensor, bounds: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """φ(q)·state / φ(q)·norm for every query block's own state: [B, H, Sq, D] of `dtype`; 0 where the norm is 0."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, heads, q_len, features = q.shape
    blocks, head_dim = bounds.shape[-1] - 1, states.shape[-1]
    bounds, states, norms = bounds.expand(batch, heads, -1), states.contiguous(), norms.contiguous()
    out = torch.empty(batch, heads, q_len, head_dim, dtype=dtype, device=q.device)
    with on_device(out):
        apply_states[(blocks, batch * heads, triton.cdiv(head_dim, width_of(features)))](
            q, states, norms, bounds, out, blocks, heads, *q.stride()[:3], *out.stride()[:3], *bounds.stride()[:2],
            FEATURES=features, BLOCK_F=max(16, triton.next_power_of_2(features)), HEAD_DIM=head_dim,
            BLOCK_V=width_of(features), TILE=TILE, PRECISION=precision_of(q.device, features),
            num_warps=8, num_stages=1,
        )  # fmt: skip
    return out


@states_of.register_fake
def _(k, v, bounds, valid):
    shape = (*k.shape[:2], bounds.shape[-1] - 1, k.shape[3])
    return v.new_empty(*shape, v.shape[3], dtype=torch.float32), v.new_empty(shape, dtype=torch.float32)


@apply.register_fake
def _(q, states, norms, bounds, dtype):
    return q.new_empty(*q.shape[:3], states.shape[-1], dtype=dtype)
