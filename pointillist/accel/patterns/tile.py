"""`tile`: every query sees whole frames, those nearest to it and some reference frames (Efficient-vDiT, LVSA).

At fixed numbers of frames the cost grows linearly with the video. The nearest frames are those that are no references,
so that every query sees equally many, at the border of the video too; the next one is seen in part, around the query's
own place. Reference frames are evenly spaced and may move on by one from step to step, so that in the end every frame
has been one (LVSA's rotating anchors).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from pointillist.accel.blocks import blocks_in
from pointillist.accel.patterns.geometry import Places, rasterise
from pointillist.accel.patterns.neighborhood import Neighborhood, in_window
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_range
from pointillist.accel.tiles import Grid, Segment, tile_count


@dataclass(frozen=True)
class Tile(Pattern):
    SIZES: ClassVar[tuple[str, ...]] = ("window", "references")
    STATIC: ClassVar[bool] = True
    window: float
    """So many nearest frames, its own among them; of one more, the fraction is the share of height and of width."""
    references: int
    """Frames that every query sees."""
    rotate: bool = False
    """The reference frames move on with the denoising step."""
    offset: int = 0
    """The first reference frame."""
    share: float = 1 / 3
    """At a density: of the frames that a query sees, so many are references."""
    ends: bool = False
    """The reference frames are the first, the second, the last, and others evenly between; of two, the first two."""

    def __post_init__(self) -> None:
        check_range("window", self.window, 1e-6, 65536)
        check_range("references", self.references, 0, 65536)
        check_range("offset", self.offset, 0, 65536)
        check_range("share", self.share, 0, 1)
        if self.ends and (self.rotate or self.offset):
            raise ValueError("tile's reference frames stay with ends=true; leave out rotate and offset")

    @classmethod
    def at_density(
        cls, density: float, grid: Grid, segments: tuple[Segment, ...] = (), block: int = 128, **options: Any
    ) -> Self:
        """From two frames on, `share` of them are references, at least one."""
        cls.check_values(options)
        share_of_references = float(options.get("share", cls.share))
        frames, image = density * grid[0], (1, grid[1], grid[2])
        references = max(1, int(frames * share_of_references + 1e-6)) if frames >= 2 else 0
        whole = int(frames - references + 1e-6)
        share = max(0.0, frames - references - whole)
        window = float(whole)
        if whole == 0 or share > 0.5 / tile_count(image, block):  # else no tile at all is nearer to it than one
            window += Neighborhood.at_density(share, image, block=block, order="frames").size
        return cls(window=window, references=references, **options)

    def at_step(self, step: int, grid: Grid) -> Self:
        return replace(self, offset=(self.offset + step) % grid[0]) if self.rotate else self

    def select(self, call: Call) -> Selection:
        blocks = blocks_in("frames", call.grid, call.block, call.device)
        mask = rasterise(self.wants, call.grid, blocks)[None, None]
        return Selection(blocks, blocks, mask, int(mask.sum()))

    def wants(self, q: Places, k: Places) -> torch.Tensor:
        """Whether the query sees the key, bool."""
        (frames, height, width), whole = q.grid, int(self.window)
        nearer = self._nearer(frames).to(q.t.device)
        seen = (nearer < whole)[q.t, k.t]
        if self.window == whole:
            return seen
        beside = in_window(q.h, k.h, height, self.window - whole) & in_window(q.w, k.w, width, self.window - whole)
        return seen | (beside & (nearer == whole)[q.t, k.t])

    def _nearer(self, frames: int) -> torch.Tensor:
        """int64 [T, T]: how many frames that are no references are nearer to a frame of queries than a frame of keys;
        −1 for references. Of two at equal distance the earlier is nearer."""
        t = torch.arange(frames)
        distance = 2 * (t[:, None] - t).abs() + (t[:, None] < t)
        count = min(self.references, frames)
        if self.ends:
            chosen = torch.cat([t[:1], torch.linspace(1, frames - 1, max(0, count - 1)).round().long()])[:count]
        else:
            chosen = (self.offset + torch.arange(count) * frames // max(1, count)) % frames
        distance[:, chosen] = -1
        return (distance.argsort(1).argsort(1) - count).clamp(min=-1)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Tile)
