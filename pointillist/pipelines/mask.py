"""Masks: which pixels of a clip may change, which tokens that concerns, and how their edge fades."""

import io
import re
from pathlib import Path

import numpy as np

from pointillist.files import write_whole
from pointillist.pipelines.video import OutputError, read_clip

RECTANGLE = re.compile(r"(\d+),(\d+),(\d+),(\d+)(?:,(\d+)-(\d+))?")
"""x,y,width,height in pixels from the top left corner, and where wanted the first and the last frame, from 0."""
CLIPS = (".mp4", ".gif")


def read_mask(text: str, frames: int, height: int, width: int) -> np.ndarray:
    """bool [frames, height, width], True where the clip may change.

    Args:
        text: a rectangle (see `RECTANGLE`), or the path of a picture (for all frames) or of a clip, white where the
            clip may change.

    Raises:
        ValueError: no mask of such a clip, with what is allowed.
        OutputError: the file cannot be read.
    """
    rectangle = RECTANGLE.fullmatch(text.replace(" ", ""))
    mask = _rectangle(rectangle, frames, height, width) if rectangle else _drawn(Path(text), frames, height, width)
    if not mask.any():
        raise ValueError(f"the mask {text!r} is empty; it must be white where the clip is to change")
    if mask.all():
        raise ValueError(f"the mask {text!r} is the whole clip; generate it anew with `pointillist generate`")
    return mask


def save_mask(mask: np.ndarray, path: Path) -> None:
    """A bool mask [height, width] of all frames as a picture that `read_mask` reads. Raises OutputError."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(data, "PNG")
    try:
        write_whole(path, data.getvalue())
    except OSError as error:
        raise OutputError(f"the mask {str(path)!r} cannot be written: {error.strerror or error}") from error


def tokens_touched(mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """bool [T, H, W] of the token grid: whether any pixel of the mask lies in the token.

    The first frame is a token in time of its own, as in causal video VAEs.
    """
    frames, height, width = grid
    pixels = mask.reshape(len(mask), height, mask.shape[1] // height, width, mask.shape[2] // width).any((2, 4))
    per_token = max(1, (len(mask) - 1) // max(1, frames - 1))
    first = [0, *range(1, len(mask), per_token)]
    return np.logical_or.reduceat(pixels, first, axis=0)


def soft_edge(mask: np.ndarray, width: int) -> np.ndarray:
    """float32 [F, H, W]: 0 outside the mask, rising inside it to 1 over `width` pixels from its border."""
    import torch
    from torch.nn.functional import max_pool2d

    outside = 1 - torch.from_numpy(mask).float()[:, None]
    weight = torch.zeros_like(outside)
    for _ in range(width):
        weight += (1 - outside) / width
        outside = max_pool2d(outside, 3, stride=1, padding=1)
    return weight[:, 0].clamp(max=1).numpy()


def _rectangle(found: re.Match[str], frames: int, height: int, width: int) -> np.ndarray:
    x, y, across, down = (int(found[i]) for i in range(1, 5))
    first, last = (int(found[i]) if found[i] else default for i, default in ((5, 0), (6, frames - 1)))
    if not (x + across <= width and y + down <= height and first <= last < frames):
        raise ValueError(
            f"the rectangle {found[0]!r} does not lie in the clip, which is {width}×{height} pixels and has the frames "
            f"0 to {frames - 1}; give x,y,width,height or x,y,width,height,first-last"
        )
    mask = np.zeros((frames, height, width), dtype=bool)
    mask[first : last + 1, y : y + down, x : x + across] = True
    return mask


def _drawn(path: Path, frames: int, height: int, width: int) -> np.ndarray:
    if not path.is_file():
        raise OutputError(f"the mask {str(path)!r} is no file, and no rectangle like 40,60,80,80 or 40,60,80,80,0-16")
    light = read_clip(path).mean(-1) > 0.5
    if light.shape[1:] != (height, width) or (path.suffix.lower() in CLIPS and len(light) != frames):
        raise ValueError(
            f"the mask {str(path)!r} has {len(light)} frames of {light.shape[2]}×{light.shape[1]} pixels; "
            f"the clip has {frames} of {width}×{height}, and so must the mask, or be one picture of this size"
        )
    return np.broadcast_to(light, (frames, height, width)) if len(light) == 1 else light
