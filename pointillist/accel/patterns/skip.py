"""`skip`: a query sees nothing of the video, for heads that may be left out (Sparse-vDiT, its mode 1).

The head's output is 0, or what it was at the last dense step. Tokens beside the video stay exact.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pointillist.accel.blocks import blocks_in
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, video_of


@dataclass(frozen=True)
class Skip(Pattern):
    STATIC: ClassVar[bool] = True
    TAIL: ClassVar[str] = "none"
    density: float
    """Means nothing: no pair is kept."""
    reuse: bool = False
    """The output of the last dense step in place of 0; that is one more tensor as large as v in every branch."""

    def select(self, call: Call) -> Selection:
        blocks = blocks_in("tiles", call.grid, call.block, call.device)
        mask = torch.zeros(1, 1, blocks.count, blocks.count, dtype=torch.bool, device=call.device)
        return Selection(blocks, blocks, mask, 0, tail=False)

    def prepare(self, call: Call, out: torch.Tensor) -> None:
        if self.reuse:
            video = video_of(call.segments)
            call.memory["output"] = out[:, :, video.start : video.stop].clone()

    def finish(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        video = video_of(call.segments)
        rows = out[:, :, video.start : video.stop]
        last = call.memory.get("output") if self.reuse else None
        if self.reuse and last is None:
            call.notes["skip: no dense step whose output could be reused, so it is 0"] += 1
        # Where nothing lies beside the video, a row that is not 0 was computed because the plan wants its frame exact.
        beside = call.k.shape[2] > video.length
        skipped = torch.ones_like(rows[..., :1], dtype=torch.bool) if beside else (rows == 0).all(-1, keepdim=True)
        finished = out.clone()
        finished[:, :, video.start : video.stop] = torch.where(
            skipped, torch.zeros_like(rows) if last is None else last, rows
        )
        return finished


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Skip)
