"""`window`: every query block sees the key blocks nearest to it in the video (STA; GNA).

Ranking by distance instead of cutting a box gives any density, and at the border of the video the
neighbourhood moves inwards instead of shrinking.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, blocks_in
from pointillist.accel.orders import places_of
from pointillist.accel.patterns.choose import select_blocks
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range


@dataclass(frozen=True)
class Window(Pattern):
    STATIC: ClassVar[bool] = True
    density: float
    order: str = "tiles"
    """Of the blocks."""
    frame_weight: float = 1.0
    """How many tokens of a frame's plane one step in time is as far as."""

    def __post_init__(self) -> None:
        check_choice("order", self.order, BLOCK_ORDERS)
        check_range("frame_weight", self.frame_weight, 0, 1000)

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        centres = centres_of(blocks, places_of(call.grid).to(call.device).float())
        centres = centres * centres.new_tensor([self.frame_weight, 1.0, 1.0])
        return select_blocks(-torch.cdist(centres, centres)[None, None], blocks, self.density)


def centres_of(blocks: Blocks, places: torch.Tensor) -> torch.Tensor:
    """float32 [n, 3]: the mean place of the tokens of every block."""
    sums = places.new_zeros(blocks.count, 3).index_add_(0, blocks.block_of_token()[0, 0], places)
    return sums / blocks.sizes[0, 0, :, None]


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Window)
