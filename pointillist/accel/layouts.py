"""From the patterns of a site's heads to one layout: one launch serves all heads, whatever their patterns."""

from functools import lru_cache

import torch

from pointillist.accel.patterns import Pattern
from pointillist.accel.tiles import Tiling
from pointillist.kernels import BlockLayout, top_k


def layout_of(
    patterns: tuple[Pattern, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    tiling: Tiling,
    scale: float,
    dense_first_frame: bool = False,
) -> tuple[BlockLayout, torch.Tensor]:
    """The layout of one attention call, built on the device without waiting for it.

    Args:
        patterns: one for all heads, or one for each.
        q, k: [B, S, H, D], final.
        scale: of the scores.
        dense_first_frame: queries of a video's first latent frame see everything.

    Returns:
        The layout, and its density: the kept share of the video × video pairs, a 0-d tensor.
    """
    if all(pattern.static for pattern in patterns):
        return _static_layout(patterns, tiling, dense_first_frame)
    return _lay_out(patterns, _scores(patterns, q, k, tiling, scale), tiling, dense_first_frame)


@lru_cache(maxsize=64)
def _static_layout(
    patterns: tuple[Pattern, ...], tiling: Tiling, dense_first_frame: bool
) -> tuple[BlockLayout, torch.Tensor]:
    """Patterns that look at no q or k give one layout for every call, and its work lists are made once."""
    nothing = tiling.centres.new_empty(0)
    scores = torch.cat([pattern.scores(nothing, nothing, tiling, 1.0) for pattern in patterns], dim=1)
    return _lay_out(patterns, scores, tiling, dense_first_frame)


def forget_layouts() -> None:
    """Let go of the layouts of static patterns, which may hold much of a GPU's memory."""
    _static_layout.cache_clear()


def _lay_out(
    patterns: tuple[Pattern, ...], scores: torch.Tensor, tiling: Tiling, dense_first_frame: bool
) -> tuple[BlockLayout, torch.Tensor]:
    """Keeps the best-scored tiles of [B|1, H|1, tiles, tiles]."""
    keeps = torch.tensor([pattern.keep for pattern in patterns])
    batch, heads, tiles, _ = scores.shape
    mask = torch.zeros(batch, heads, tiling.blocks, tiling.blocks, dtype=torch.bool, device=scores.device)
    mask[:, :, tiles:] = True
    mask[..., tiles:] = True
    mask[:, :, :tiles, :tiles] = top_k(scores, patterns[0].keep if len(patterns) == 1 else keeps)
    full = tiling.first_frame_tiles if dense_first_frame else 0
    mask[:, :, :full] = True
    exact = tiling.blocks - tiles
    pairs_per_head = (tiles - full) * (keeps + exact) + (full + exact) * tiling.blocks
    order = tiling.order[None, None]
    layout = BlockLayout.from_bounds(
        mask, tiling.bounds, tiling.bounds, tiling.tokens, tiling.tokens,
        max_query_block=tiling.largest, max_key_block=tiling.largest,
        pairs=batch * int(pairs_per_head.expand(heads).sum()), query_order=order, key_order=order,
    )  # fmt: skip
    return layout, _density(mask[:, :, :tiles, :tiles], tiling.sizes[:tiles])


def _scores(
    patterns: tuple[Pattern, ...], q: torch.Tensor, k: torch.Tensor, tiling: Tiling, scale: float
) -> torch.Tensor:
    """[B|1, H|1, tiles, tiles]; heads with equal patterns are scored together."""
    if len(patterns) == 1:
        return patterns[0].scores(q, k, tiling, scale)
    scores = torch.empty(q.shape[0], len(patterns), tiling.tiles, tiling.tiles, device=q.device)
    for pattern in set(patterns):
        heads = [head for head, other in enumerate(patterns) if other == pattern]
        scores[:, heads] = pattern.scores(q[:, :, heads], k[:, :, heads], tiling, scale).to(scores.dtype)
    return scores


def _density(mask: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    kept = torch.einsum("bhqk,q,k->bh", mask.float(), sizes, sizes)
    return kept.mean() / sizes.sum() ** 2
