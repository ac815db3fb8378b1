"""Batched k-means over tokens, one for every batch entry and head (Sparse VideoGen 2, section 4.1)."""

from dataclasses import dataclass

import torch

from pointillist.kernels.layout import block_of_place
from pointillist.kernels.pooling import in_order, pool_blocks


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
    x: torch.Tensor, count: int, *, iterations: int, seed: int = 0, centroids: torch.Tensor | None = None
) -> Clusters:
    """Cluster x [B, H, S, D] into `count` clusters by Lloyd's algorithm, on the device and deterministically.

    Args:
        iterations: assignments to make; 1 or 2 are enough from centroids of the step before.
        seed: of a generator of its own, for the tokens that are the first centroids.
        centroids: [B, H, count, D] to start from instead.

    Raises:
        ValueError: `count` is not within 1 and S, or `centroids` have another shape.
    """
    batch, heads, length, head_dim = x.shape
    if not 1 <= count <= length or iterations < 1:
        raise ValueError(f"count is {count} and iterations {iterations}; allowed are 1 to {length} and 1 or more")
    if centroids is None:
        generator = torch.Generator(device=x.device).manual_seed(seed)
        chosen = torch.rand(batch, heads, length, device=x.device, generator=generator).topk(count, dim=-1).indices
        centroids = x.gather(2, chosen[..., None].expand(-1, -1, -1, head_dim))
    elif tuple(centroids.shape) != (batch, heads, count, head_dim):
        raise ValueError(
            f"the centroids are {tuple(centroids.shape)}; they must be {(batch, heads, count, head_dim)}, "
            "[B, H, count, D]"
        )
    for _ in range(iterations):
        clusters = _sorted(nearest(x, centroids), count)
        means, sizes = pool_blocks(in_order(x, clusters[0]), clusters[1])
        centroids = torch.where(sizes[..., None] > 0, means, centroids.to(means.dtype))  # empty ones stay
    return Clusters(*clusters, centroids)


def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """int32 [B, H, S]: the number of the centroid [B, H, n, D] nearest to each token of x [B, H, S, D]."""
    if x.is_cuda:
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
    return order, bounds
