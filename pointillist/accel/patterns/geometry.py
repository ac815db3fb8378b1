"""Static patterns: a rule for pairs of tokens by their places, rasterised to pairs of blocks.

A pair of blocks is kept if it holds any pair of tokens that the rule wants: inside a kept pair all tokens see each
other, so a layout keeps a little more than its rule, never less.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch

from pointillist.accel.blocks import Blocks, blocks_in
from pointillist.accel.orders import places_of
from pointillist.accel.patterns.pattern import Call, Pattern, Selection
from pointillist.accel.tiles import Grid, Segment

CPU = torch.device("cpu")
SAMPLED_ROWS = 48
"""Query blocks, evenly spaced, on which a wished density is tried out; fewer where the video is long."""
SAMPLED_TOKENS = 2**20
BISECTIONS = 12


@dataclass(frozen=True, eq=False)
class Places:
    """Where tokens are: coordinates that broadcast against those of the other side, int32."""

    t: torch.Tensor
    h: torch.Tensor
    w: torch.Tensor
    grid: Grid


class Geometric(Pattern):
    """A static pattern with one `size` in (0, 1] that its density grows with; 1 wants every pair.

    A subclass is a frozen dataclass with the fields `size: float` and `order: str` (of `BLOCK_ORDERS`), and perhaps
    others, and defines `wants`.
    """

    SIZES: ClassVar[tuple[str, ...]] = ("size",)
    STATIC: ClassVar[bool] = True
    size: float
    order: str

    def wants(self, q: Places, k: Places) -> torch.Tensor:
        """Whether the query sees the key, bool: the definition of the pattern. A token always sees itself."""
        raise NotImplementedError

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        mask = rasterise(self.wants, call.grid, blocks)[None, None]
        return Selection(blocks, blocks, mask, int(mask.sum()))

    @classmethod
    def at_density(
        cls, density: float, grid: Grid, segments: tuple[Segment, ...] = (), block: int = 128, **options: Any
    ) -> Self:
        """The size whose density, tried out on some query blocks, is nearest to the wished one."""
        cls.check_options(options)
        return _sized(cls, density, grid, block, tuple(sorted(options.items())))  # type: ignore[arg-type]


@lru_cache(maxsize=512)
def _sized(cls: type[Geometric], density: float, grid: Grid, block: int, options: tuple[tuple[str, Any], ...]) -> Any:
    """Bisection: the density grows with the size, in steps."""
    low, high, best = 0.0, 1.0, (float("inf"), 1.0)
    for size in (1.0, *(None,) * BISECTIONS):
        size = (low + high) / 2 if size is None else size
        pattern = cls(size=size, **dict(options))  # type: ignore[call-arg]
        blocks = blocks_in(pattern.order, grid, block, CPU)
        number = min(blocks.count, SAMPLED_ROWS, max(12, SAMPLED_TOKENS // math.prod(grid)))
        rows = torch.linspace(0, blocks.count - 1, number).round().long()
        kept = rasterise(pattern.wants, grid, blocks, rows).float() @ blocks.sizes[0, 0]
        realised = float(kept @ blocks.sizes[0, 0, rows] / blocks.sizes[0, 0, rows].sum() / blocks.sizes.sum())
        best = min(best, (abs(realised - density), size))
        low, high = (low, size) if realised > density else (size, high)
    return cls(size=best[1], **dict(options))  # type: ignore[call-arg]


def rasterise(
    wants: Callable[[Places, Places], torch.Tensor], grid: Grid, blocks: Blocks, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """The block pairs that hold a wanted token pair.

    Args:
        blocks: the same for queries and keys and for all heads.
        rows: int64, only these query blocks; all if None.

    Returns:
        bool [rows, blocks], on the device of `blocks`.
    """
    order, bounds, device = blocks.order[0, 0], blocks.bounds[0, 0], blocks.order.device
    t, h, w = places_of(grid).to(device, torch.int32)[order].unbind(1)
    keys = Places(t[None], h[None], w[None], grid)
    starts = bounds.tolist()
    chosen = range(blocks.count) if rows is None else rows.tolist()
    kept = torch.zeros(len(chosen), blocks.count, dtype=torch.bool, device=device)
    ends = bounds.long()
    for row, i in enumerate(chosen):
        tokens = slice(starts[i], starts[i + 1])
        queries = Places(t[tokens, None], h[tokens, None], w[tokens, None], grid)
        seen = torch.nn.functional.pad(wants(queries, keys).any(0).cumsum(0), (1, 0))
        kept[row] = seen[ends].diff() > 0
    return kept
