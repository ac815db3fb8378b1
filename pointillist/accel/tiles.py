"""Cuts a token sequence into blocks that are compact in the video, not in the sequence.

A local token order is worth about 1.5 dB over raster order at equal density (DFSAttn): the keys of a compact
block resemble each other, so their mean speaks for them. Tiles are the cells of a balanced k-d tree: equally large,
so that none is padded, and near-cubic.
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
    first_frame_tiles: int
    """So many first tiles are the first latent frame of a video; 0 for a single image."""
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
def tile_count(grid: Grid, block: int) -> int:
    """How many tiles of at most `block` tokens the video is cut into."""
    return sum(_parts(frames * grid[1] * grid[2], block) for frames in _spans(grid))


@lru_cache(maxsize=16)
def tiling_of(grid: Grid, segments: tuple[Segment, ...], block: int, device: torch.device) -> Tiling:
    """The tiling of a sequence on `device`; a pure function of its arguments, so all callers share it."""
    tile_of_video, centres = _video_tiles(grid, block)
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
        first_frame_tiles=int((centres[:, 0] == 0).sum()) if grid[0] > 1 else 0,
        largest=int(sizes.max()),
    )


def _spans(grid: Grid) -> tuple[int, ...]:
    """Frames of the parts that share no tile. The first latent frame is one: causal VAEs encode it by itself, and
    its statistics differ from those of the frames after it, each of which holds several frames of video."""
    return (1, grid[0] - 1) if grid[0] > 1 else (1,)


def _parts(tokens: int, block: int) -> int:
    """The least number of parts of at most `block` tokens; up to an eighth more if they then are equal."""
    least = -(-tokens // block)
    return next((n for n in range(least, least + least // 8 + 1) if tokens % n == 0), least)


def _video_tiles(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tile of every token of the grid, int64 [T·H·W], and every tile's centre, float32 [tiles, 3]."""
    places = torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, 3)
    tiles, start = [], 0
    for frames in _spans(grid):
        tokens = torch.arange(start, start + frames * grid[1] * grid[2])
        tiles += _halve(tokens, places, _parts(len(tokens), block))
        start += len(tokens)
    tile_of_token = torch.empty(start, dtype=torch.int64)
    for tile, tokens in enumerate(tiles):
        tile_of_token[tokens] = tile
    return tile_of_token, torch.stack([places[tokens].float().mean(0) for tokens in tiles])


def _halve(tokens: torch.Tensor, places: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Cut `tokens` into `parts` of equal size (give or take one) by halving the longest axis again and again."""
    if parts == 1:
        return [tokens]
    mine = places[tokens]
    lengths = mine.amax(0) - mine.amin(0) + 1
    rank = torch.zeros(len(tokens), dtype=torch.int64)
    for axis in lengths.argsort(descending=True, stable=True).tolist():
        rank = rank * lengths[axis] + mine[:, axis] - mine[:, axis].amin()
    tokens = tokens[rank.argsort()]
    cut = len(tokens) * (parts // 2) // parts
    return _halve(tokens[:cut], places, parts // 2) + _halve(tokens[cut:], places, parts - parts // 2)


def block_means(x: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """Means of the tokens of every block: [B, S, H, D] → [B, H, n, D], in float32 or wider."""
    batch, _, heads, head_dim = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(batch, tiling.blocks, heads * head_dim, dtype=wide, device=x.device)
    sums.index_add_(1, tiling.block_of_token, x.flatten(2).to(wide))
    return (sums / tiling.sizes[:, None]).view(batch, tiling.blocks, heads, head_dim).transpose(1, 2)
