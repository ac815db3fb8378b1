"""Block means in Triton: one program per block, so that the sum's order, and with it the result, never varies."""

import torch
import triton
import triton.language as tl

from pointillist.kernels.triton import on_device


@triton.jit
def block_means(
    X, BOUNDS, VALID, OUT, blocks, heads, stride_xb, stride_xh, stride_xs, stride_bb, stride_bh, stride_vb, stride_vh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    BOUNDS += b * stride_bb + h * stride_bh + block
    first, last = tl.load(BOUNDS), tl.load(BOUNDS + 1)
    X += b * stride_xb + h * stride_xh
    VALID += b * stride_vb + h * stride_vh
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    total = tl.zeros([BLOCK_D], tl.float32)
    count = tl.zeros([], tl.float32)
    for start in range(first, last, TILE):
        places = (start + tl.arange(0, TILE)).to(tl.int64)
        ok = places < last
        if HAS_VALID:
            ok = ok & (tl.load(VALID + places, mask=ok, other=0) != 0)
        x = tl.load(X + places[:, None] * stride_xs + dims[None, :], mask=ok[:, None] & dim_ok[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
        count += tl.sum(ok.to(tl.float32), 0)
    mean = total / tl.maximum(count, 1.0)
    tl.store(OUT + (head_of_batch * blocks + block) * HEAD_DIM + dims, mean.to(OUT.dtype.element_ty), mask=dim_ok)


@torch.library.custom_op("pointillist::block_means", mutates_args=())
def pool_blocks(x: torch.Tensor, bounds: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Means [B, H, n, D] of x [B, H, S, D] over blocks [B|1, H|1, n+1], of the `valid` places [B, H|1, S] only."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, _, head_dim = x.shape
    blocks = bounds.shape[-1] - 1
    bounds = bounds.expand(batch, heads, -1)
    valid = None if valid is None else valid.expand(batch, heads, -1)
    out = x.new_empty(batch, heads, blocks, head_dim)
    with on_device(out):
        block_means[(blocks, batch * heads)](
            x, bounds, bounds if valid is None else valid, out, blocks, heads, *x.stride()[:3], *bounds.stride()[:2],
            *((0, 0) if valid is None else valid.stride()[:2]),
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), TILE=64, HAS_VALID=valid is not None,
            num_warps=4,
        )  # fmt: skip
    return out


@pool_blocks.register_fake
def _(x, bounds, valid):
    return x.new_empty(*x.shape[:2], bounds.shape[-1] - 1, x.shape[3])
