"""`Blocks`: the video's tokens in an order, cut into blocks. What patterns choose pairs of."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from pointillist.accel.orders import ORDERS, order_of
from pointillist.accel.tiles import Grid, frame_tiles_of, tiles_of
from pointillist.kernels import pool_blocks, uniform_bounds
from pointillist.kernels.clustering import Clusters
from pointillist.kernels.layout import block_of_place
from pointillist.kernels.pooling import in_order

BLOCK_ORDERS = ("tiles", "frames", *ORDERS)
"""`tiles` are compact in space and time, `frames` compact in space and within one frame; the rest are runs of equal
length along the orders of `orders.py`."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of video tokens; of another size or order in every head if need be."""

    order: torch.Tensor
    """int64 [B|1, H|1, N]: the video token at each place."""
    bounds: torch.Tensor
    """int32 [B|1, H|1, n+1]: block i covers places bounds[i] to bounds[i+1]; it may be empty."""
    largest: int
    """At least the tokens of the largest block."""
    first_frame: int | None = None
    """So many first blocks are exactly the first latent frame; None where blocks mix frames."""
    uniform: bool = False
    """Every block but the last is as large as the largest."""
    even: bool = False
    """All blocks are about equally large, so that a share of them is a share of the tokens."""
    name: str = ""
    """Of the order, if it is one of `BLOCK_ORDERS`."""

    @property
    def count(self) -> int:
        return self.bounds.shape[-1] - 1

    @property
    def sizes(self) -> torch.Tensor:
        """float32 [B|1, H|1, n]: tokens in each block."""
        return self.bounds.diff().float()

    def block_of_token(self) -> torch.Tensor:
        """int64 [B|1, H|1, N]: the block that holds each token."""
        of_place = block_of_place(self.bounds, self.order.shape[-1])
        shape = torch.broadcast_shapes(of_place.shape, self.order.shape)
        return torch.empty(shape, dtype=torch.int64, device=self.order.device).scatter_(
            2, self.order.expand(shape), of_place.expand(shape)
        )

    @classmethod
    def of_clusters(cls, clusters: Clusters) -> "Blocks":
        """Clusters of tokens as blocks; the largest may be as large as the video."""
        return cls(clusters.order, clusters.bounds, clusters.order.shape[-1])


@lru_cache(maxsize=64)
def blocks_in(order: str, grid: Grid, block: int, device: torch.device) -> Blocks:
    """Blocks of at most `block` tokens in the order `order`, one of `BLOCK_ORDERS`; callers share the result."""
    first_frame: int | None
    if order == "tiles":
        places, bounds, first_frame = tiles_of(grid, block)
    elif order == "frames":
        places, bounds = frame_tiles_of(grid, block)
        first_frame = (len(bounds) - 1) // grid[0] if grid[0] > 1 else 0
    else:
        places = order_of(order, grid)
        bounds, first_frame = uniform_bounds(len(places), block), None if grid[0] > 1 else 0
    return Blocks(
        places.to(device)[None, None],
        bounds.to(device)[None, None],
        int(bounds.diff().max()),
        first_frame,
        uniform=order in ORDERS,
        even=True,
        name=order,
    )


@lru_cache(maxsize=16)
def places_in(order: str, grid: Grid, block: int, device: torch.device) -> torch.Tensor:
    """int64 [N]: the place of each video token in the order `order`."""
    return blocks_in(order, grid, block, device).order[0, 0].argsort()


def block_means(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Means of the tokens of every block: x [B, H, N, D] → [B, H, n, D], in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda or blocks.order.shape[:2] != (1, 1):
        return pool_blocks(in_order(x, blocks.order), blocks.bounds)[0].to(wide)
    tokens_first = x.permute(0, 2, 1, 3).flatten(2).to(wide)  # a view where x came as [B, S, H, D]
    sums = tokens_first.new_zeros(x.shape[0], blocks.count, tokens_first.shape[2])
    sums.index_add_(1, blocks.block_of_token()[0, 0], tokens_first)
    return (sums / blocks.sizes[0, 0, :, None]).unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)
