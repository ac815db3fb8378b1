"""Which tokens a region step computes: importance, ageing, selection. Pure functions of tensors."""

import math
from itertools import pairwise

import torch

from pointillist.accel.tiles import Grid

FRAMES = 3
"""Neighbouring latent frames whose importance is shared, so that they are not updated in turns (flicker)."""
ROUNDING = 64
"""Numbers of tokens are multiples of it, as kernels like them."""


def importance(velocity: torch.Tensor, before: torch.Tensor | None, grid: Grid, focus: str) -> torch.Tensor:
    """How much each token matters, float32 [B, N].

    Args:
        velocity: [B, C, F, H, W], the guided one; or [B, N, C].
        before: the velocity when the token was last computed, for `change`; None: nothing is known, all matter alike.
        focus: `change`, `low_std` or `high_std` (see `Regions`).
    """
    velocity = velocity.float()
    if focus != "change":
        each = velocity.std(1, keepdim=True)
    elif before is not None:
        each = (velocity - before).square().mean(1, keepdim=True)
    else:
        each = torch.ones_like(velocity[:, :1])
    found = _per_token(each, grid)
    if focus == "low_std":
        found = 1 / (found + 1e-6)
    return _over_frames(found.view(-1, *grid)).flatten(1)


def aged(importance: torch.Tensor, age: torch.Tensor, rate: float, max_age: int) -> torch.Tensor:
    """Scores [B, N]: larger is updated first. Importance is relative to its mean, so that `rate` has a meaning.

    A token's score grows the longer it was not computed: RAS lets it fall for those that it drops for a high score,
    which starves them. From `max_age` steps on a token comes before all younger ones.
    """
    relative = importance / importance.mean(1, keepdim=True).clamp(min=1e-20)
    score = relative * torch.exp(rate * age)
    return torch.where(age >= max_age, score + 1e12 * (1 + age), score)


def tokens_of(score: torch.Tensor, share: float) -> torch.Tensor:
    """int64 [B, n]: the tokens of the greatest scores, ascending; n is the same whatever the scores."""
    tokens = score.shape[1]
    count = min(tokens, math.ceil(share * tokens))
    if tokens >= 16 * ROUNDING:
        count = min(tokens, -(-count // ROUNDING) * ROUNDING)
    return score.topk(count, dim=1).indices.sort(1).values


def tiles_of(score: torch.Tensor, share: float, order: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """int64 [B, n]: the tokens of the tiles whose tokens have the greatest mean scores, tile by tile.

    A tile smaller than the largest names its last token several times, so that n is the same whatever the scores.

    Args:
        order: int64 [N], the token at each place.
        bounds: [tiles+1], places where tiles begin.
    """
    sizes = bounds.diff().long()
    within = torch.arange(int(sizes.max()), device=order.device)
    places = bounds[:-1, None].long() + within.clamp(max=sizes[:, None] - 1)
    tokens = order[places]  # [tiles, largest]
    count = min(len(sizes), math.ceil(share * len(sizes)))
    means = torch.stack([score[:, order[first:stop]].mean(1) for first, stop in _spans(bounds)], 1)
    chosen = means.topk(count, dim=1).indices.sort(1).values
    return tokens[chosen].flatten(1)


def _spans(bounds: torch.Tensor) -> list[tuple[int, int]]:
    return list(pairwise(bounds.tolist()))


def _per_token(each: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The mean over the pixels of every token: [B, 1, F, H, W] → [B, N]."""
    if each.ndim == 3:
        return each[:, 0]
    frames, height, width = grid
    patches = each[:, 0].unflatten(1, (frames, -1)).unflatten(3, (height, -1)).unflatten(5, (width, -1))
    return patches.mean((2, 4, 6)).flatten(1)


def _over_frames(importance: torch.Tensor) -> torch.Tensor:
    """[B, T, H, W]: the mean over neighbouring frames."""
    if importance.shape[1] == 1:
        return importance
    padded = torch.cat([importance[:, :1], importance, importance[:, -1:]], 1)
    return torch.stack([padded[:, i : i + importance.shape[1]] for i in range(FRAMES)]).mean(0)
