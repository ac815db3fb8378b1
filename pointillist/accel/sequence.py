"""How the tokens of one attention call lie: which are video, which text, which padding."""

from dataclasses import dataclass

import torch

from pointillist.accel.models.family import Family, Tokens
from pointillist.accel.tiles import Segment


class NotTheGridError(ValueError):
    """A call whose tokens cannot be laid out; it runs densely."""


@dataclass(frozen=True)
class Sequence:
    """Segments of the call as patterns see it, and the way there and back."""

    segments: tuple[Segment, ...]
    length: int
    """Of the keys."""
    key_lengths: torch.Tensor | None = None
    """int64 [B]: so many keys of each entry are no padding; padding is the end then."""
    order: torch.Tensor | None = None
    """int64 [B, S]: the token at each place, where text is moved behind the video so that its padding comes last."""

    def into(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] as patterns see it. Queries of the video alone get others behind them, which are dropped."""
        if x.shape[1] < self.length:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.length - x.shape[1]))
        return x if self.order is None else x.gather(1, _index(self.order, x))

    def back(self, out: torch.Tensor, queries: int) -> torch.Tensor:
        """The output [B, S, H, D] of so many queries as the model wants it."""
        if self.order is not None:
            out = torch.empty_like(out).scatter_(1, _index(self.order, out), out)
        return out[:, :queries]


def sequence_of(
    family: Family, tokens: Tokens, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None
) -> Sequence:
    """Of queries [B, S, H, D] and keys [B, Sk, H, D].

    Raises:
        NotTheGridError: why not.
    """
    length = keys.shape[1]
    segments = family.segments(tokens, length)
    if segments is None:
        raise NotTheGridError(f"{length} tokens are not the grid {'×'.join(map(str, tokens.grid))}")
    video = next(segment for segment in segments if segment.kind == "video")
    if queries.shape[1] != length and (video.start, video.length) != (0, queries.shape[1]):
        raise NotTheGridError(f"{queries.shape[1]} queries are not those of {length} keys")
    if mask is None:
        return Sequence(segments, length)
    if mask.ndim == 2 and mask.shape == (queries.shape[0], length):  # as Diffusers' dispatcher reads it
        mask = mask[:, None, None]
    whole = (queries.shape[0], queries.shape[2], queries.shape[1], length)
    fits = mask.ndim == 4 and all(size in (1, full) for size, full in zip(mask.shape, whole, strict=True))
    if not family.MASKED or mask.dtype != torch.bool or not fits or mask.shape[3] != length:
        raise NotTheGridError(f"attention has a {mask.dtype} mask {list(mask.shape)}, which is not padding")
    valid = mask[:, 0, min(video.start, mask.shape[2] - 1)].expand(queries.shape[0], -1)
    lengths = valid.sum(1)
    if family.TEXT != "before":
        return Sequence(segments, length, lengths)
    place = torch.arange(length, device=keys.device)
    start = (lengths - video.length)[:, None] if family.PACKED else video.start
    is_video = (place >= start) & (place < start + video.length)
    order = torch.where(is_video, 0, torch.where(valid, 1, 2)).argsort(dim=1, stable=True)
    moved = (Segment("video", 0, video.length), Segment("text", video.length, length - video.length))
    return Sequence(moved if length > video.length else segments, length, lengths, order)


def _index(order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return order[:, :, None, None].expand(-1, -1, *x.shape[2:])
