"""Decoding in parts: each process of a job decodes its own frames of a clip, and all of them get the whole clip.

A video autoencoder that is causal in time looks back over latent frames, less the further back they are. So a process
decodes some more before its own and drops their pictures. The first process has nothing before its frames, so more of
them are its own, and all decode equally many. Whether the context was long enough is seen at the seams: the pictures
just before its own were decoded by its neighbour too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.vae import DecoderOutput

from pointillist.accel.parallel import engine

CONTEXT = {"AutoencoderKLWan": 12}
"""Latent frames, by the autoencoder's class; others are decoded in one pass, by every process."""
WORTH = 0.75
"""Where a part would be longer than this share of the clip, it is decoded in one pass too."""
SEAM = 2 * 0.1 / 255
"""So much may the two decodings of a picture at a seam differ, of values from -1 to 1: a tenth of a step of 8 bits.
Beside it, some roundings of the dtype: in bfloat16 two decodings of equal latents differ by more than that."""
ROUNDINGS = 4


class Part(NamedTuple):
    """Latent frames of one process: it decodes those from `start` to `stop`, and keeps the pictures from `own` on."""

    start: int
    own: int
    stop: int


def parts_of(frames: int, processes: int, context: int) -> list[Part]:
    """Of `frames` latent frames, one part for each process; empty if that is not worth it."""
    if frames < context + processes:
        return []
    bounds = [0, *(context + (frames - context) * each // processes for each in range(1, processes)), frames]
    parts = [Part(max(0, own - context), own, stop) for own, stop in pairwise(bounds)]
    return parts if max(stop - start for start, _, stop in parts) <= WORTH * frames else []


@contextmanager
def decoding_in_parts(pipe: Any) -> Iterator[None]:
    """Within, `pipe.vae.decode` is carried out by all processes of the job together, and all must call it alike."""
    vae: Any = getattr(pipe, "vae", None)
    context = CONTEXT.get(type(vae).__name__)
    if context is None or not dist.is_initialized():
        yield
        return
    in_one_pass, ratio = vae.decode, pipe.vae_scale_factor_temporal
    notes: list[str] = []
    before = vars(vae).get("decode")

    def decode(z: torch.Tensor, return_dict: bool = True) -> Any:
        parts = parts_of(z.shape[2], dist.get_world_size(), context)
        whole = _whole(in_one_pass, z, parts, ratio) if parts else None
        if whole is None:
            if parts:
                notes.append("decoded in one pass: the pictures of parts did not agree at their seams")
            return in_one_pass(z, return_dict=return_dict)
        return DecoderOutput(sample=whole) if return_dict else (whole,)

    decode.notes = notes  # type: ignore[attr-defined]
    vae.decode = decode
    try:
        yield
    finally:
        del vae.decode
        if before is not None:
            vae.decode = before


def _whole(decode: Any, z: torch.Tensor, parts: list[Part], ratio: int) -> torch.Tensor | None:
    """[B, C, F, H, W]: the pictures of all processes. None if neighbours do not agree on those at a seam."""
    rank = dist.get_rank()
    mine, kept = parts[rank], [_pictures(part, ratio) for part in parts]
    decoded = decode(z[:, :, mine.start : mine.stop], return_dict=False)[0]
    whole = _in_a_row(decoded[:, :, -kept[rank] :], kept)
    before = sum(kept[:rank])
    seam = torch.zeros(1, device=z.device)
    if rank:
        twice = decoded[:, :, : -kept[rank]][:, :, -ratio:]
        seam += (whole[:, :, before - ratio : before] - twice).abs().amax()
    with engine.telling():
        dist.all_reduce(seam, dist.ReduceOp.MAX)
    return whole if float(seam) <= SEAM + ROUNDINGS * torch.finfo(z.dtype).eps else None


def _pictures(part: Part, ratio: int) -> int:
    """How many a part keeps: a clip's first latent frame is one, each other `ratio`."""
    return (part.stop - part.own) * ratio - (ratio - 1 if part.own == 0 else 0)


def _in_a_row(pictures: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[B, C, F, H, W] of all processes, which have `counts` pictures. They are filled up to equally many on the way, as
    gloo gathers nothing else."""
    missing = max(counts) - pictures.shape[2]
    filled = torch.cat([pictures, pictures[:, :, :1].expand(-1, -1, missing, -1, -1)], 2).contiguous()
    found = [torch.empty_like(filled) for _ in counts]
    with engine.telling():
        dist.all_gather(found, filled)
    return torch.cat([each[:, :, :count] for each, count in zip(found, counts, strict=True)], 2)
