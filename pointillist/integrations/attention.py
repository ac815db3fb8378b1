"""One attention call of another engine, with one pattern in all heads and nothing remembered from call to call."""

import logging
from functools import lru_cache
from typing import Any

import torch

from pointillist.accel.layouts import Group, lay_out, pattern_for, select
from pointillist.accel.patterns import PATTERNS, pattern_class
from pointillist.accel.patterns.pattern import Call, Pattern
from pointillist.accel.plan import TAILS
from pointillist.accel.tails import attend
from pointillist.accel.tiles import Grid, whole_video

logger = logging.getLogger(__name__)
USABLE_TAILS = tuple(tail for tail in TAILS if tail != "rescaled")


def check_choice(pattern: str, density: float, tail: str) -> None:
    """Raises ValueError for what cannot be done in a single call."""
    if pattern not in PATTERNS:
        raise ValueError(f"pattern {pattern!r} is unknown; allowed are {', '.join(usable_patterns())}")
    if pattern not in usable_patterns():
        raise ValueError(
            f"{pattern} remembers earlier steps or has trained weights, which one call has not; allowed are "
            f"{', '.join(usable_patterns())}"
        )
    if not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; it must be a number above 0 and at most 1")
    if tail not in USABLE_TAILS:
        raise ValueError(f"tail {tail!r} is not possible here; allowed are {', '.join(USABLE_TAILS)}")


@lru_cache(maxsize=1)
def usable_patterns() -> tuple[str, ...]:
    """Those that need nothing but the call."""
    return tuple(name for name in PATTERNS if _is_usable(pattern_class(name)))


def _is_usable(pattern: type[Pattern]) -> bool:
    return pattern.prepare is Pattern.prepare and pattern.finish is Pattern.finish and not pattern.HIDDEN_STATES


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid,
    pattern: str = "pooled",
    density: float = 0.25,
    tail: str = "pooled",
    scale: float | None = None,
    block: int = 128,
    **options: Any,
) -> torch.Tensor:
    """Self-attention of a video's tokens in the order of the grid; q, k, v and the output are [B, S, H, D].

    Raises:
        ValueError: a pattern, an option, a density or a tail that is not possible here.
    """
    check_choice(pattern, density, tail)
    found = pattern_for(pattern, density, tuple(sorted(options.items())), grid, whole_video(grid), block)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = Call(q, k, v, scale, grid, whole_video(grid), block)
    group = Group(found)
    return attend(call, lay_out([(group, select(group, call))], call), tail).transpose(1, 2)


@lru_cache(maxsize=64)
def note_dense(engine: str, why: str) -> None:
    """Say once why calls run densely."""
    logger.warning("pointillist in %s runs densely: %s", engine, why)
