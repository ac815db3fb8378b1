"""How far two clips are apart: PSNR and SSIM, in float arithmetic on RGB in [0, 1]."""

from dataclasses import dataclass

import numpy as np

PSNR_CAP = 100.0
"""Decibels reported for frames that are identical (the true value is infinite)."""
_SIGMA, _RADIUS = 1.5, 5  # Wang et al. 2004: an 11 × 11 Gaussian window of deviation 1.5


@dataclass(frozen=True)
class Comparison:
    """How clip B differs from clip A."""

    psnr: float
    """Mean over frames of the frames' PSNR, dB, at most 100."""
    ssim: float
    """Mean over frames, 1 for identical."""
    psnr_per_frame: tuple[float, ...]
    identical: bool


def compare(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Compare two clips, float [F, H, W, 3] in [0, 1].

    Raises:
        ValueError: the shapes differ, values are not finite, or frames are smaller than the SSIM window of 11 pixels.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"the clips must have one shape [frames, height, width, 3]; given {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("the clips hold values that are not finite")
    per_frame = tuple(psnr(x, y) for x, y in zip(a, b, strict=True))
    similarity = float(np.mean([ssim(x, y) for x, y in zip(a, b, strict=True)]))
    return Comparison(float(np.mean(per_frame)), similarity, per_frame, bool(np.array_equal(a, b)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two images in [0, 1], dB, capped at 100."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return PSNR_CAP if error == 0 else min(PSNR_CAP, -10 * float(np.log10(error)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two images [H, W, C] in [0, 1] (Wang et al. 2004), mean over pixels and channels.

    Pixels whose window would leave the image are not counted.
    """
    if min(a.shape[:2]) <= 2 * _RADIUS:
        raise ValueError(f"SSIM needs images larger than {2 * _RADIUS} pixels on a side; given {a.shape[:2]}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a, variance_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float(np.mean(luminance * structure))


def _blur(image: np.ndarray) -> np.ndarray:
    """Gaussian blur of [H, W, C] without the border that the window does not cover."""
    window = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    window /= window.sum()
    for axis in (0, 1):
        length = image.shape[axis] - 2 * _RADIUS
        image = sum(
            weight * np.take(image, np.arange(shift, shift + length), axis=axis) for shift, weight in enumerate(window)
        )
    return image
