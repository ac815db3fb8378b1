"""Where tokens lie when a sequence of several streams (text, video) is split over processes and put together again.

Each stream is split by itself, so every process holds a part of each, and parts in a row are
`text 0, video 0, text 1, video 1, …`. Patterns need `text, video`.
"""

from functools import lru_cache

import torch


def part_sizes(length: int, parts: int) -> list[int]:
    """Of `length` tokens split into parts, as `torch.tensor_split` does: the first ones are one longer."""
    least, longer = divmod(length, parts)
    return [least + (part < longer) for part in range(parts)]


@lru_cache(maxsize=256)
def tokens_in_a_row(lengths: tuple[int, ...], parts: int, device: torch.device) -> torch.Tensor:
    """int64 [S]: the token (streams one after the other) at each place of the parts in a row."""
    streams = torch.arange(sum(lengths), device=device).split(list(lengths))
    split = [stream.tensor_split(parts) for stream in streams]
    return torch.cat([stream[part] for part in range(parts) for stream in split])


@lru_cache(maxsize=256)
def places_in_a_row(lengths: tuple[int, ...], parts: int, device: torch.device) -> torch.Tensor | None:
    """int64 [S]: the place of each token, the inverse; None where both are the identity."""
    return None if len(lengths) == 1 else tokens_in_a_row(lengths, parts, device).argsort()


def tokens_of_ring_rank(
    lengths: tuple[int, ...], ulysses: int, ring: int, rank: int, device: torch.device
) -> torch.Tensor:
    """int64 [n]: the tokens that the processes of one place in the ring hold together, in their order."""
    parts = ulysses * ring
    sizes = [sum(sizes) for sizes in zip(*(part_sizes(length, parts) for length in lengths), strict=True)]
    start = sum(sizes[: rank * ulysses])
    stop = start + sum(sizes[rank * ulysses : (rank + 1) * ulysses])
    return tokens_in_a_row(lengths, parts, device)[start:stop]
