"""`a_shape`: every query sees the first tokens and those around it in an order of the axes (MInference's A-shape).

There it is causal; a video's tokens see those after them as well.
"""

from dataclasses import dataclass

import torch

from pointillist.accel.orders import AXES
from pointillist.accel.patterns.diagonal import band, near, place_in
from pointillist.accel.patterns.geometry import Geometric, Places
from pointillist.accel.patterns.pattern import check_choice, check_range


@dataclass(frozen=True)
class AShape(Geometric):
    size: float
    """Half the window's width, as a share of the video."""
    order: str = "thw"
    """Slowest axis first; the window and the blocks are along it, and the sink is at its start."""
    sink: int = 128
    """Tokens that every query sees, but no more than the window reaches to either side."""

    def __post_init__(self) -> None:
        check_range("size", self.size, 1e-6, 1)
        check_choice("order", self.order, AXES)
        check_range("sink", self.sink, 0, 1 << 24)

    def wants(self, q: Places, k: Places) -> torch.Tensor:
        key, width = place_in(self.order, k), band(self.size, q)
        return near(place_in(self.order, q), key, width) | (key < min(self.sink, width))


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(AShape)
