"""`diagonal`: a band around the diagonal in an order of the axes (Sparse VideoGen's two kinds of heads; Sparse-vDiT).

In the order `thw` a query sees its own frame and the frames around it, in `hwt` the places around its own in all
frames: seen frame by frame, that is many diagonals. With a first frame that everybody sees, its tokens have blocks of
their own where the order scatters them: nearly every block would hold one of them otherwise, and be seen by all.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from pointillist.accel.blocks import Blocks
from pointillist.accel.orders import AXES, order_of
from pointillist.accel.patterns.geometry import Geometric, Places, rasterise
from pointillist.accel.patterns.pattern import Call, Selection, check_choice, check_range
from pointillist.accel.tiles import Grid, Segment
from pointillist.kernels import uniform_bounds


@dataclass(frozen=True)
class Diagonal(Geometric):
    size: float
    """Half the band's width, as a share of the video."""
    order: str = "thw"
    """Slowest axis first; the band and the blocks are along it."""
    sink: bool = False
    """The first latent frame is always seen, wherever the order puts its tokens."""

    def __post_init__(self) -> None:
        check_range("size", self.size, 1e-6, 1)
        check_choice("order", self.order, AXES)

    @classmethod
    def at_density(
        cls, density: float, grid: Grid, segments: tuple[Segment, ...] = (), block: int = 128, **options: Any
    ) -> Self:
        """With a scattered first frame, a band over the others that keeps what the first frame leaves."""
        cls.check_values(options)
        (frames, height, width), order = grid, options.get("order", "thw")
        if not _apart(order, options.get("sink", False), grid):
            return super().at_density(density, grid, segments, block, **options)
        rest = max(0.0, (density * frames - 1) / (frames - 1))
        return replace(super().at_density(rest, (frames - 1, height, width), segments, block, order=order), sink=True)

    def select(self, call: Call) -> Selection:
        if not _apart(self.order, self.sink, call.grid):
            return super().select(call)
        blocks = _first_frame_apart(self.order, call.grid, call.block, call.device)
        mask = rasterise(self.wants, call.grid, blocks)[None, None]
        return Selection(blocks, blocks, mask, int(mask.sum()))

    def wants(self, q: Places, k: Places) -> torch.Tensor:
        within = near(place_in(self.order, q), place_in(self.order, k), band(self.size, q))
        return within | (k.t == 0) if self.sink and q.grid[0] > 1 else within


def place_in(order: str, tokens: Places) -> torch.Tensor:
    """int64: the place of tokens in an order of the axes."""
    place = torch.zeros_like(tokens.t)
    for axis in order:
        place = place * tokens.grid["thw".index(axis)] + getattr(tokens, axis)
    return place


def band(size: float, tokens: Places) -> int:
    """How many places the share `size` of the video reaches to either side; all others at 1."""
    return int(size * (math.prod(tokens.grid) - 1))


def _apart(order: str, sink: bool, grid: Grid) -> bool:
    return sink and grid[0] > 1 and order[0] != "t"


def _first_frame_apart(order: str, grid: Grid, block: int, device: torch.device) -> Blocks:
    """Runs of the order without the first latent frame, and before them runs of that."""
    tokens, frame = order_of(order, grid), grid[1] * grid[2]
    in_first = tokens < frame
    own, rest = uniform_bounds(frame, block), uniform_bounds(len(tokens) - frame, block)
    bounds = torch.cat([own, rest[1:] + frame]).to(device)
    joined = torch.cat([tokens[in_first], tokens[~in_first]]).to(device)
    return Blocks(joined[None, None], bounds[None, None], int(bounds.diff().max()), len(own) - 1)


def near(q: torch.Tensor, k: torch.Tensor, width: int) -> torch.Tensor:
    """|q − k| ≤ width, in two comparisons instead of three passes over the pairs."""
    return (k >= q - width) & (k <= q + width)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Diagonal)
