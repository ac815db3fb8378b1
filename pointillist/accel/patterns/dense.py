"""`dense`: every query tile sees every key tile."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pointillist.accel.tiles import Grid, Segment, Tiling, tile_count


@dataclass(frozen=True)
class Dense:
    static: ClassVar[bool] = True
    keep: int

    @classmethod
    def at_density(cls, density: float, grid: Grid, segments: tuple[Segment, ...] = (), block: int = 128) -> "Dense":
        """Dense at any wish: a head that must be exact beside sparse ones."""
        return cls(tile_count(grid, block))

    def scores(self, q: torch.Tensor, k: torch.Tensor, tiling: Tiling, scale: float) -> torch.Tensor:
        """All equal: [1, 1, tiles, tiles]."""
        return tiling.centres.new_zeros(1, 1, tiling.tiles, tiling.tiles)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Dense)
