"""The nearest centroid of every token in Triton: no matrix of tokens × centroids is ever written (flash-kmeans)."""

import torch
import triton
import triton.language as tl

from pointillist.kernels.triton import on_device
from pointillist.kernels.triton.configs import precision_of, small_config


@triton.jit
def nearest_centroid(
    X, CENTROIDS, LABELS, heads, length, count, stride_xb, stride_xh, stride_xs,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, TILE_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    places = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    ok = places < length
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    x = tl.load(
        X + b * stride_xb + h * stride_xh + places[:, None] * stride_xs + dims[None, :],
        mask=ok[:, None] & dim_ok[None, :],
        other=0.0,
    )
    CENTROIDS += head_of_batch * count * HEAD_DIM
    best = tl.full([TILE], float("-inf"), tl.float32)
    label = tl.zeros([TILE], tl.int32)
    for start in range(0, count, TILE_C):
        numbers = start + tl.arange(0, TILE_C)
        number_ok = numbers < count
        c = tl.load(
            CENTROIDS + numbers[None, :].to(tl.int64) * HEAD_DIM + dims[:, None],
            mask=number_ok[None, :] & dim_ok[:, None],
            other=0.0,
        )
        wide = c.to(tl.float32)
        closeness = tl.dot(x, c, input_precision=PRECISION)
        closeness = closeness - 0.5 * tl.sum(wide * wide, 0)[None, :]  # −|x − c|²/2 but for |x|²/2
        closeness = tl.where(number_ok[None, :], closeness, float("-inf"))
        highest = tl.max(closeness, 1)
        at = tl.argmax(closeness, 1) + start
        label = tl.where(highest > best, at.to(tl.int32), label)
        best = tl.maximum(best, highest)
    tl.store(LABELS + head_of_batch * length + places, label, mask=ok)


@torch.library.custom_op("pointillist::nearest", mutates_args=())
def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """int32 [B, H, S]: the number of the centroid [B, H, n, D] nearest to each token of x [B, H, S, D]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, head_dim = x.shape
    centroids = centroids.to(x.dtype).contiguous()
    config = small_config(head_dim, x.element_size())
    labels = torch.empty(batch, heads, length, dtype=torch.int32, device=x.device)
    with on_device(labels):
        nearest_centroid[(triton.cdiv(length, config.tile_q), batch * heads)](
            x, centroids, labels, heads, length, centroids.shape[2], *x.stride()[:3],
            HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            TILE=config.tile_q, TILE_C=config.tile_k,
            PRECISION=precision_of(x.device, head_dim), **config.options(),
        )  # fmt: skip
    return labels


@nearest.register_fake
def _(x, centroids):
    return x.new_empty(x.shape[:3], dtype=torch.int32)
