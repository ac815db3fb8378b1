"""Cuts a token sequence into blocks that are compact in the video, not in the sequence.

The keys of a compact block resemble each other, so their mean speaks for them: DFSAttn measures 1.5 dB over runs of the
sequence. (In the embedded model tiles within a frame are better than those, and tiles across frames worse.) Tiles are
the cells of a balanced k-d tree: equally large, so that none is padded, and near-cubic.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

Grid = tuple[int, int, int]
"""(T, H, W): latent patches, flattened frame by frame to token t·H·W + h·W + w."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind: `video` (one run, in the order of the grid), `text`, `condition` or `pad`."""

    kind: str
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


def whole_video(grid: Grid) -> tuple[Segment, ...]:
    """The segments of a sequence that is nothing but the video."""
    return (Segment("video", 0, math.prod(grid)),)


@lru_cache(maxsize=64)
def tile_count(grid: Grid, block: int) -> int:
    """How many tiles of at most `block` tokens the video is cut into."""
    return sum(_parts((stop - start) * grid[1] * grid[2], block) for start, stop in _spans(grid))


@lru_cache(maxsize=64)
def tiles_of(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The tiles of the video in one run of places.

    Returns:
        int64 [T·H·W], the token at each place; int32 [tiles+1], where each tile begins; and how many first tiles are
        the first latent frame, 0 for a single image. A pure function of its arguments; callers share the result.
    """
    parts = [_halve_span(grid, span, block) for span in _spans(grid)]
    order, bounds = _joined([tile for part in parts for tile in part])
    return order, bounds, len(parts[0]) if len(parts) > 1 else 0


@lru_cache(maxsize=16)
def frame_tiles_of(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `tiles_of`, with tiles that lie within one frame; all frames are cut alike."""
    tiles = [tile for frame in range(grid[0]) for tile in _halve_span(grid, (frame, frame + 1), block)]
    return _joined(tiles)


def _spans(grid: Grid) -> tuple[tuple[int, int], ...]:
    """The parts (first frame, behind the last) that share no tile. The first latent frame is one: causal VAEs encode it
    by itself, and its statistics differ from those of the frames after it, each of which holds several of video."""
    return ((0, 1), (1, grid[0])) if grid[0] > 1 else ((0, 1),)


def _parts(tokens: int, block: int) -> int:
    """The least number of parts of at most `block` tokens; up to an eighth more if they then are equal."""
    least = -(-tokens // block)
    return next((n for n in range(least, least + least // 8 + 1) if tokens % n == 0), least)


def _halve_span(grid: Grid, frames: tuple[int, int], block: int) -> list[torch.Tensor]:
    """The tokens of every tile of some frames."""
    per_frame = grid[1] * grid[2]
    tokens = torch.arange(frames[0] * per_frame, frames[1] * per_frame)
    places = torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, 3)
    return _halve(tokens, places, _parts(len(tokens), block))


def _joined(tiles: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles as one order and its bounds. Within a tile, tokens keep their own order."""
    sizes = torch.tensor([0, *(len(tile) for tile in tiles)])
    return torch.cat([tile.sort().values for tile in tiles]), sizes.cumsum(0).int()


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
