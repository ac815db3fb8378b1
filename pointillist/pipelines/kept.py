"""What is kept of a generation, so that a region of its clip can be repainted: its velocities and its frames.

From the noise of the seed and the guided velocity of every step, any deterministic sampler comes to the same latents
again, bit by bit and without the model. So tokens that are given their old velocities stay what they were.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pointillist.files import write_whole
from pointillist.pipelines.video import OutputError, to_pixels

if TYPE_CHECKING:
    import torch

    from pointillist.pipelines.run import Run

SUFFIX = ".safetensors"
SETTINGS = ("model", "prompt", "negative_prompt", "seed", "steps", "frames", "width", "height", "guidance", "request")
"""Facts by which a kept generation and a clip belong together."""


@dataclass(frozen=True)
class Kept:
    """Of one generation."""

    velocities: torch.Tensor
    """[steps, 1, C, F, H, W], what the scheduler was given, in its dtype, on the CPU."""
    sigmas: tuple[float, ...]
    """Of the steps, in the scheduler's units."""
    pixels: np.ndarray
    """uint8 [F, H, W, 3], before encoding."""

    @classmethod
    def of(cls, run: Run, frames: np.ndarray | None = None) -> Kept:
        """Of a run that kept its velocities; `frames` [F, H, W, 3] in [0, 1] where they are not the run's own."""
        import torch

        return cls(torch.stack(run.velocities), run.sigmas, to_pixels(run.frames if frames is None else frames))

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return self.velocities.nbytes + self.pixels.nbytes


def check_kept_file(path: Path) -> None:
    """Raise `ValueError` for a name that no kept generation can have."""
    if path.suffix.lower() != SUFFIX:
        raise ValueError(f"the file {str(path)!r} of what is kept must end in {SUFFIX}")


def save_kept(path: Path, kept: Kept, facts: dict[str, Any]) -> None:
    """Write it whole, or raise `OutputError`. `facts` are those of the clip."""
    import torch
    from safetensors.torch import save

    tensors = {
        "velocities": kept.velocities.contiguous(),
        "sigmas": torch.tensor(kept.sigmas, dtype=torch.float64),
        "pixels": torch.from_numpy(kept.pixels).contiguous(),
    }
    try:
        write_whole(path, save(tensors, {"pointillist": json.dumps(facts, allow_nan=False)}))
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def load_kept(path: Path, facts: dict[str, Any]) -> Kept:
    """Read what `save_kept` wrote of the clip with these facts.

    Raises:
        OutputError: the file cannot be read, or is of another generation.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise OutputError(f"there is no file {str(path)!r}")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            theirs = json.loads((file.metadata() or {})["pointillist"])
            velocities, sigmas, pixels = (file.get_tensor(name) for name in ("velocities", "sigmas", "pixels"))
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise OutputError(f"{str(path)!r} is not what `generate --keep` writes: {error}") from error
    differing = [name for name in SETTINGS if not isinstance(theirs, dict) or theirs.get(name) != facts.get(name)]
    if differing:
        raise OutputError(f"{str(path)!r} is of another clip: {', '.join(differing)} differ; give the clip's own file")
    shape = (facts["frames"], facts["height"], facts["width"], 3)
    fits = velocities.ndim == 6 and len(velocities) == len(sigmas) == facts["steps"] and velocities.is_floating_point()
    if not fits or tuple(pixels.shape) != shape or pixels.dtype != torch.uint8:
        raise OutputError(f"{str(path)!r} holds tensors that do not fit its clip; generate it anew with --keep")
    return Kept(velocities, tuple(sigmas.tolist()), pixels.numpy())
