"""Plans run end to end, beside the dense clip of the same prompt and seed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pointillist.accel.accelerate import accelerate
from pointillist.accel.plan import Plan
from pointillist.metrics import compare
from pointillist.search.run import run
from pointillist.search.study import Study


@dataclass(frozen=True)
class Clip:
    """One generation."""

    frames: np.ndarray
    """float32 [F, H, W, C] in [0, 1]."""
    denoise: float
    """Seconds of denoising."""
    attention: float
    """Seconds of it in self-attention."""
    density: float | None
    """Mean over sparse calls; None if there were none."""
    fallbacks: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """A plan's clip against the dense one."""

    speedup: float
    """Of denoising."""
    attention_speedup: float
    psnr: float
    """dB."""
    ssim: float
    density: float
    fallbacks: tuple[str, ...]


def clip(
    pipe: Any, study: Study, plan: Plan | str, prompt: str, stepped: Callable[[int], None], seed: int | None = None
) -> Clip:
    """Run a plan."""
    with accelerate(pipe, plan) as handle:
        frames = run(pipe, study, prompt, stepped, seed)
        report = handle.report()
    return Clip(
        np.asarray(frames), report.denoise_seconds, report.attention_seconds, report.density, tuple(report.fallbacks)
    )


def against(dense: Clip, fast: Clip) -> Measured:
    """What a plan's clip gained and lost."""
    difference = compare(dense.frames, fast.frames)
    return Measured(
        speedup=dense.denoise / fast.denoise,
        attention_speedup=dense.attention / fast.attention,
        psnr=difference.psnr,
        ssim=difference.ssim,
        density=1.0 if fast.density is None else fast.density,
        fallbacks=fast.fallbacks,
    )
