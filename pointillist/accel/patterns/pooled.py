"""`pooled`: every query tile sees the key tiles with the highest pooled scores.

The score of a tile is that of the mean of its keys, q̄·k̄/√D: the logarithm of the softmax mass for each token that
it costs (Jenga; Sol-Attn). Ranking by the whole mass, with + ln n, would favour the larger tiles and so keep more
than the density asks for.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pointillist.accel.patterns.keep import tiles_kept
from pointillist.accel.tiles import Grid, Segment, Tiling, block_means


@dataclass(frozen=True)
class Pooled:
    static: ClassVar[bool] = False
    keep: int
    """Key tiles kept for each query tile, itself included."""

    @classmethod
    def at_density(cls, density: float, grid: Grid, segments: tuple[Segment, ...] = (), block: int = 128) -> "Pooled":
        """As many tiles of at most `block` tokens as come nearest to `density`."""
        return cls(tiles_kept(density, grid, block))

    def scores(self, q: torch.Tensor, k: torch.Tensor, tiling: Tiling, scale: float) -> torch.Tensor:
        """Log masses per token [B, H, tiles, tiles] from q, k [B, S, H, D]; a tile ranks itself first."""
        tiles = tiling.tiles
        q_means, k_means = (block_means(x, tiling)[:, :, :tiles] for x in (q, k))
        scores = q_means @ k_means.transpose(-1, -2) * scale
        scores.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
        return scores


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Pooled)
