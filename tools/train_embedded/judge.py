"""Decide by plain image analysis what a clip shows: colours by medians, motion by the centroid's path,
shape by its outline."""

import numpy as np

from pointillist.pipelines.embedded.vocabulary import BACKGROUNDS, COLORS, RGB
from train_embedded.scene import Words

DIFFERENT = 0.3  # distance in RGB from the background at which a pixel belongs to the object
TRAVEL = 0.2  # of the frame: less is no translation
SCALE = 1.45  # ratio of sizes: less is no growth
TURNED = 0.86  # overlap with the first silhouette below which an object has turned
ROUND = 0.045  # relative ripple of the outline below which it is a circle
CORNERS = {3: "triangle", 4: "square", 5: "star"}


def _nearest(color: np.ndarray, named: dict[str, RGB]) -> str:
    return min(named, key=lambda name: float(np.linalg.norm(color - np.array(named[name]))))


def _centroid(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5])


def _outline_ripple(mask: np.ndarray) -> np.ndarray:
    """Amplitudes of the 3-, 4- and 5-fold ripple of the outline's radius over its mean."""
    rows, columns = np.nonzero(mask)
    x, y = columns + 0.5 - _centroid(mask)[0], rows + 0.5 - _centroid(mask)[1]
    bins = ((np.arctan2(y, x) / (2 * np.pi) + 0.5) * 60).astype(int) % 60
    radius = np.zeros(60)
    np.maximum.at(radius, bins, np.hypot(x, y))
    spectrum = np.abs(np.fft.rfft(radius)) / 60
    return 2 * spectrum[[3, 4, 5]] / max(spectrum[0], 1e-6)


def _overlap(mask: np.ndarray, first: np.ndarray) -> float:
    """Intersection over union of two silhouettes laid centroid on centroid."""
    shift = np.round(_centroid(first) - _centroid(mask)).astype(int)
    moved = np.roll(mask, (shift[1], shift[0]), axis=(0, 1))
    return float((moved & first).sum() / (moved | first).sum())


def judge(frames: np.ndarray) -> Words | None:
    """What `frames` (float [F, H, W, 3] in [0, 1]) shows, or None if there is no object in some frame."""
    height, width = frames.shape[1:3]
    rim = max(2, height // 24)
    border = np.concatenate(
        [frames[:, :rim].reshape(-1, 3), frames[:, -rim:].reshape(-1, 3), frames[:, :, :rim].reshape(-1, 3)]
    )
    ground = np.median(border, axis=0)
    masks = np.linalg.norm(frames - ground, axis=-1) > DIFFERENT
    if masks.sum(axis=(1, 2)).min() < 0.004 * height * width:
        return None
    color = _nearest(np.median(frames[masks], axis=0), COLORS)

    path = np.array([_centroid(mask) for mask in masks]) / (width, height)
    travel = path[-3:].mean(0) - path[:3].mean(0)
    areas = masks.sum(axis=(1, 2)).astype(float)
    growth = float(np.sqrt(areas[-3:].mean() / areas[:3].mean()))
    ripple = np.median([_outline_ripple(mask) for mask in masks], axis=0)
    shape = "circle" if ripple.max() < ROUND else CORNERS[3 + int(ripple.argmax())]
    if np.abs(travel).max() > TRAVEL:
        axis = int(np.abs(travel).argmax())
        motion = (("left", "right"), ("up", "down"))[axis][int(travel[axis] > 0)]
    elif growth > SCALE or growth < 1 / SCALE:
        motion = "growing" if growth > 1 else "shrinking"
    else:
        motion = "rotating" if min(_overlap(mask, masks[0]) for mask in masks) < TURNED else "still"
    return Words(color, shape, motion, _nearest(ground, BACKGROUNDS))
