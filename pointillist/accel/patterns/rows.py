"""Exact softmax rows of a few queries, for patterns that find a head's structure on them (MInference; Sparse VideoGen).

The rows come from everywhere in the video: the last ones, which language models are sampled on, say little where
attention is not causal. Only keys of the video count, so a row sums to 1 over them.
"""

from functools import lru_cache

import torch

from pointillist.accel.patterns.pattern import Call

ROWS = 64


@lru_cache(maxsize=64)
def sampled_places(length: int, count: int = ROWS) -> tuple[int, ...]:
    """One place in each of `count` equal runs of `length`, or all of them if there are no more.

    Where in its run is drawn at random: places at equal distances could all lie in one column of the video.
    """
    count = min(count, length)
    starts = torch.arange(count + 1) * length // count
    drawn = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return tuple((starts[:-1] + (drawn * starts.diff()).long()).tolist())


@lru_cache(maxsize=64)
def sampled_index(length: int, device: torch.device) -> torch.Tensor:
    """`sampled_places` as int64 on the device; callers share the result."""
    return torch.tensor(sampled_places(length)).to(device)


def softmax_rows(call: Call, tokens: torch.Tensor) -> torch.Tensor:
    """What the video's queries `tokens`, int64 [R], give to each of its keys: [B, H, R, N], float32 or wider."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q, k = call.video_q.index_select(2, tokens).to(wide), call.video_k.to(wide)
    return (q @ k.transpose(-1, -2) * call.scale).softmax(-1)


def diagonal_masses(rows: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
    """Sums of rows [B, H, R, N] at `places` along their diagonals: [B, H, 2N − 1], entry d + N − 1 for key − query = d.

    They are added one after the other, so that the sums never vary.
    """
    length = rows.shape[-1]
    sums = rows.new_zeros(*rows.shape[:2], 2 * length - 1)
    for row, place in enumerate(places):
        sums[..., length - 1 - place : 2 * length - 1 - place] += rows[:, :, row]
    return sums


def ranks_of(masses: torch.Tensor) -> torch.Tensor:
    """int64 like masses [..., n]: 0 for the highest, n − 1 for the lowest; equal ones in their order."""
    ranking = masses.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(ranking).scatter_(
        -1, ranking, torch.arange(masses.shape[-1], device=masses.device).expand_as(ranking)
    )


def lowest_within(values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, longest: int) -> torch.Tensor:
    """The minimum of values[..., first : first + length] for many such runs.

    Args:
        values: [B, H, n].
        first, length: int64 [nq, nk]; runs lie within n, and are of at least 1 and at most `longest`.

    Returns:
        [B, H, nq, nk], by two look-ups each: any run is covered by two of a power of two.
    """
    levels, width = [values], 1
    while 2 * width <= longest:
        levels.append(torch.minimum(levels[-1], levels[-1].roll(-width, -1)))  # what wraps around is never looked up
        width *= 2
    table, level = torch.cat(levels, -1), torch.frexp(length.float()).exponent.long() - 1
    begin = level * values.shape[-1] + first
    return torch.minimum(table[..., begin], table[..., begin + length - 2**level])
