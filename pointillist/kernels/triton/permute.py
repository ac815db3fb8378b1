"""Tokens taken in another order, or put back into their own, in Triton.

q, k and v are put in order once and the output back, outside of the attention kernel: two visits of each, 0.4 % of
attention at 120,000 tokens, by estimate. Inside, keys would be gathered once for every tile of queries, and the
addresses of queries and outputs cost the loop 20 registers a thread, which at head dimension 128 spills.
"""

import torch
import triton
import triton.language as tl

from pointillist.kernels.triton import on_device


@triton.jit
def move_rows(
    X, OUT, ORDER, heads, length, stride_xb, stride_xh, stride_xs, stride_rb, stride_rh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    places = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    ok = places < length
    dims = tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = tl.load(ORDER + b * stride_rb + h * stride_rh + places, mask=ok, other=0)
    sources, targets = tokens, places
    if BACK:
        sources, targets = places, tokens
    x = tl.load(X + b * stride_xb + h * stride_xh + sources[:, None] * stride_xs + dims[None, :], mask=mask)
    tl.store(OUT + (head_of_batch * length + targets[:, None]) * HEAD_DIM + dims[None, :], x, mask=mask)


@torch.library.custom_op("pointillist::permute", mutates_args=())
def permute(x: torch.Tensor, order: torch.Tensor, back: bool) -> torch.Tensor:
    """x [B, H, S, D] at the tokens `order` [B|1, H|1, S], int64, contiguous; or `back`, which undoes that."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, _, head_dim = x.shape
    order = order.expand(batch, heads, -1)
    out = x.new_empty(batch, heads, order.shape[-1], head_dim)
    with on_device(out):
        move_rows[(triton.cdiv(order.shape[-1], 64), batch * heads)](
            x, out, order, heads, order.shape[-1], *x.stride()[:3], *order.stride()[:2],
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), TILE=64, BACK=back, num_warps=4,
        )  # fmt: skip
    return out


@permute.register_fake
def _(x, order, back):
    return x.new_empty(*x.shape[:2], order.shape[-1], x.shape[3])
