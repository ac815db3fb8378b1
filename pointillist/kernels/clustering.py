"""Batched k-means over tokens, one for every batch entry and head (Sparse VideoGen 2, section 4.1)."""

from dataclasses import dataclass

import torch

from pointillist.kernels.layout import block_of_place
from pointillist.kernels.pooling import has_kernels, in_order, pool_blocks, valid_places


@dataclass(frozen=True)
class Clusters:
    """Tokens sorted by cluster: what a `BlockLayout` of variable blocks needs."""

    order: torch.Tensor
    """int64 [B, H, S]: the token at each place; within a cluster in their own order."""
    bounds: torch.Tensor
    """int32 [B, H, n+1]: cluster i covers places bounds[i] to bounds[i+1]; it may be empty."""
    centroids: torch.Tensor
    """[B, H, n, D]: the means, of the tokens' dtype; pass them back in for a warm start."""

    @property
    def labels(self) -> torch.Tensor:
        """int64 [B, H, S]: every token's cluster."""
        of_place = block_of_place(self.bounds, self.order.shape[-1])
        return torch.empty_like(of_place).scatter_(2, self.order, of_place)


def k_means(
    x: torch.Tensor,
    count: int,
    *,
    iterations: int = 2,
    seed: int = 0,
    centroids: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> Clusters:
    """Cluster x [B, H, S, D] into `count` clusters by Lloyd's algorithm, on the device and deterministically.

    Args:
        iterations: assignments to make; 1 or 2 are enough from centroids of the step before.
        seed: of a generator of its own, for the tokens that are the first centroids.
        centroids: [B, H, count, D] to start from instead.
        lengths: int64 [B], valid tokens per batch entry. Padding moves no centroid; it lies in the last places, which
            belong to the last cluster, so a layout needs the same `key_lengths`.

    Raises:
        ValueError: x is not [B, H, S, D], `count` is not within 1 and S, or `centroids` or `lengths` do not fit.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be floating [B, H, S, D]")
    batch, heads, length, head_dim = x.shape
    if not isinstance(count, int) or not 1 <= count <= length or iterations < 1:
        raise ValueError(f"count is {count} and iterations {iterations}; allowed are 1 to {length} and 1 or more")
    if lengths is not None and (tuple(lengths.shape) != (batch,) or lengths.device != x.device):
        raise ValueError(f"lengths are {tuple(lengths.shape)} on {lengths.device}; x needs ({batch},) on {x.device}")
    valid = valid_places(length, lengths, None, x.device)
    if valid is not None:
        x = x.masked_fill(~valid[..., None], 0)
    if centroids is None:
        chosen = first_tokens(x, count, seed, lengths)
        centroids = x.gather(2, chosen[..., None].expand(-1, -1, -1, head_dim))
    elif tuple(centroids.shape) != (batch, heads, count, head_dim):
        raise ValueError(
            f"the centroids are {tuple(centroids.shape)}; they must be {(batch, heads, count, head_dim)}, "
            "[B, H, count, D]"
        )
    for _ in range(iterations):
        labels = nearest(x, centroids)
        if valid is not None:
            labels = labels.masked_fill(~valid, count)  # behind all clusters
        order, bounds = _sorted(labels, count)
        means, sizes = pool_blocks(in_order(x, order), bounds, lengths, order)
        centroids = torch.where(sizes[..., None] > 0, means, centroids.to(means.dtype))  # empty ones stay
    return Clusters(order, bounds, centroids)


@torch.library.custom_op("pointillist::first_tokens", mutates_args=())
def first_tokens(x: torch.Tensor, count: int, seed: int, lengths: torch.Tensor | None) -> torch.Tensor:
    """int64 [B, H, count]: different valid tokens of x [B, H, S, D], drawn at random by a private generator."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    drawn = torch.rand(x.shape[:3], device=x.device, generator=generator)
    valid = valid_places(x.shape[2], lengths, None, x.device)
    return (drawn if valid is None else drawn.masked_fill(~valid, -1)).topk(count, dim=-1).indices


@first_tokens.register_fake
def _(x, count, seed, lengths):
    return x.new_empty(*x.shape[:2], count, dtype=torch.int64)


def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """int32 [B, H, S]: the number of the centroid [B, H, n, D] nearest to each token of x [B, H, S, D]."""
    if has_kernels(x):
        from pointillist.kernels.triton.nearest import nearest as on_device

        return on_device(x, centroids)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, centroids = x.to(wide), centroids.to(wide)
    halves = centroids.square().sum(-1)[:, :, None] / 2
    closest = [(rows @ centroids.transpose(-1, -2) - halves).argmax(-1) for rows in x.split(4096, dim=2)]
    return torch.cat(closest, dim=2).int()


def _sorted(labels: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and bounds of tokens by label: a stable sort, so no atomics and one possible result."""
    in_place, order = labels.sort(dim=-1, stable=True)
    edges = torch.arange(count + 1, dtype=labels.dtype, device=labels.device)
    bounds = torch.searchsorted(in_place, edges.expand(*labels.shape[:2], -1).contiguous(), out_int32=True)
    bounds[..., -1] = labels.shape[-1]  # with padding, which has a label of its own
    return order, bounds
