"""`window`: every query tile sees the key tiles nearest to it in the video (STA; GNA).

Ranking by distance instead of cutting a box gives any density, and at the border of the video the
neighbourhood moves inwards instead of shrinking.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pointillist.accel.patterns.keep import tiles_kept
from pointillist.accel.tiles import Grid, Segment, Tiling


@dataclass(frozen=True)
class Window:
    static: ClassVar[bool] = True
    keep: int
    """Key tiles kept for each query tile, itself included."""

    @classmethod
    def at_density(cls, density: float, grid: Grid, segments: tuple[Segment, ...] = (), block: int = 128) -> "Window":
        """The window of tiles of at most `block` tokens whose share of the grid is nearest to `density`."""
        return cls(tiles_kept(density, grid, block))

    def scores(self, q: torch.Tensor, k: torch.Tensor, tiling: Tiling, scale: float) -> torch.Tensor:
        """Minus the distance between centres, in tokens: [1, 1, tiles, tiles]."""
        return -torch.cdist(tiling.centres, tiling.centres)[None, None]


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Window)
