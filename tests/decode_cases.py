"""Clips that several processes decode together. Imported by the processes of `jobs`."""

import torch

from pointillist.accel.parallel import decode
from pointillist.pipelines.load import load_pipeline

FRAMES = 33


def latents():
    """float32 [1, 16, 33, 4, 4], a little alike from frame to frame as those of clips are."""
    noise = torch.randn(1, 16, FRAMES, 4, 4, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.avg_pool3d(noise, (5, 1, 1), 1, (2, 0, 0)) * 2


def run_case(name: str):
    """The pictures that all processes have then, the lengths of what this one has decoded, and what was noted: at the
    context and in the dtype that `name` says."""
    context, _, dtype = name.partition(" ")
    kind = getattr(torch, dtype or "float32")
    pipe, lengths = load_pipeline("embedded", dtype=kind), []
    plain = pipe.vae.decode

    def watched(z, return_dict=True):
        lengths.append(z.shape[2])
        return plain(z, return_dict=return_dict)

    pipe.vae.decode = watched
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1, 1) for each in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    usual, decode.CONTEXT = decode.CONTEXT, {type(pipe.vae).__name__: int(context)}
    with torch.no_grad(), decode.decoding_in_parts(pipe):
        sample = pipe.vae.decode((latents() * std + mean).to(kind), return_dict=False)[0]
        notes = getattr(pipe.vae.decode, "notes", [])
    decode.CONTEXT = usual
    assert pipe.vae.decode is watched  # again
    return sample, lengths, notes
