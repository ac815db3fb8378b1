"""Cuts a token sequence into blocks that are compact in the video, not in the sequence.

A local token order is worth about 1.5 dB over raster order at equal density (DFSAttn): the keys of a compact
block resemble each other, so their mean speaks for them. Tiles divide each axis evenly, so every tile is one
block and none is padded.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

Grid = tuple[int, int, int]
"""(T, H, W): latent patches, flattened frame by frame to token t·H·W + h·W + w."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind: `video` (in the order of the grid), `text` or `condition`."""

    kind: str
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class Tiling:
    """The blocks of a sequence of S tokens: video tiles, then those of other segments, which are exact."""

    order: torch.Tensor
    """int64 [S]: the token at each place."""
    bounds: torch.Tensor
    """int32 [n+1]: block i covers places bounds[i] to bounds[i+1]."""
    block_of_token: torch.Tensor
    """int64 [S]: the block that holds each token."""
    sizes: torch.Tensor
    """float32 [n]: tokens in each block."""
    centres: torch.Tensor
    """float32 [tiles, 3]: the middle of each video tile in the grid, (t, h, w) in tokens."""
    tiles: int
    """The first `tiles` blocks are video; every pair with one of the others is always kept."""
    largest: int
    """Tokens in the largest block."""

    @property
    def blocks(self) -> int:
        return self.bounds.numel() - 1

    @property
    def tokens(self) -> int:
        return self.order.numel()


def whole_video(grid: Grid) -> tuple[Segment, ...]:
    """The segments of a sequence that is nothing but the video."""
    return (Segment("video", 0, math.prod(grid)),)


@lru_cache(maxsize=64)
def tile_counts(grid: Grid, block: int) -> Grid:
    """Into how many parts to cut each axis: tiles of at most `block` tokens with the least total surface.

    Small surface means few tiles and near-cubic ones. It is weighted by how much the largest tile exceeds the mean
    one: equal tiles are computed in batches.
    """
    best, best_cost = grid, math.inf
    for t in range(1, min(grid[0], block) + 1):
        for h in range(1, min(grid[1], block // t) + 1):
            for w in range(1, min(grid[2], block // (t * h)) + 1):
                counts = (-(-grid[0] // t), -(-grid[1] // h), -(-grid[2] // w))
                a, b, c = (length / count for length, count in zip(grid, counts, strict=True))
                surface = math.prod(counts) * (a * b + b * c + c * a)
                largest = math.prod(-(-length // count) for length, count in zip(grid, counts, strict=True))
                cost = surface * largest / (a * b * c)
                if cost < best_cost:
                    best, best_cost = counts, cost
    return best


@lru_cache(maxsize=16)
def tiling_of(grid: Grid, segments: tuple[Segment, ...], block: int, device: torch.device) -> Tiling:
    """The tiling of a sequence on `device`; a pure function of its arguments, so all callers share it."""
    tile_of_video, centres = _video_tiles(grid, tile_counts(grid, block))
    tiles = centres.shape[0]
    block_of_token = torch.empty(sum(segment.length for segment in segments), dtype=torch.int64)
    blocks = tiles
    for segment in segments:
        tokens = slice(segment.start, segment.start + segment.length)
        if segment.kind == "video":
            block_of_token[tokens] = tile_of_video
        else:
            block_of_token[tokens] = blocks + torch.arange(segment.length) // block
            blocks += -(-segment.length // block)
    sizes = torch.bincount(block_of_token, minlength=blocks)
    bounds = torch.zeros(blocks + 1, dtype=torch.int32)
    bounds[1:] = sizes.cumsum(0)
    return Tiling(
        order=torch.argsort(block_of_token, stable=True).to(device),
        bounds=bounds.to(device),
        block_of_token=block_of_token.to(device),
        sizes=sizes.float().to(device),
        centres=centres.to(device),
        tiles=tiles,
        largest=int(sizes.max()),
    )


def _video_tiles(grid: Grid, counts: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """The tile of every token of the grid, int64 [T·H·W], and every tile's centre, float32 [tiles, 3]."""
    parts, middles = [], []
    for length, count in zip(grid, counts, strict=True):
        starts = torch.arange(count + 1) * length // count
        parts.append(torch.bucketize(torch.arange(length), starts, right=True) - 1)
        middles.append((starts[:-1] + starts[1:] - 1) / 2)
    t, h, w = torch.meshgrid(*parts, indexing="ij")
    tile_of_token = (t * counts[1] + h) * counts[2] + w
    return tile_of_token.flatten(), torch.cartesian_prod(*middles).view(-1, 3)


def block_means(x: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """Means of the tokens of every block: [B, S, H, D] → [B, H, n, D], in float32 or wider."""
    batch, _, heads, head_dim = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(batch, tiling.blocks, heads * head_dim, dtype=wide, device=x.device)
    sums.index_add_(1, tiling.block_of_token, x.flatten(2).to(wide))
    return (sums / tiling.sizes[:, None]).view(batch, tiling.blocks, heads, head_dim).transpose(1, 2)
