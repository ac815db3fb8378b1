"""Grids of models that pack their latents: read off the positions that they give their tokens.

Reading waits for a GPU, so what a tensor says is kept as long as the tensor lives: pipelines make it once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from pointillist.accel.models.family import Tokens
from pointillist.accel.tiles import Grid

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def tokens_of_ids(ids: torch.Tensor) -> Tokens:
    """Of ids [N, 3 or more] or [B, N, 3 or more] in the order image, row, column …, image by image.

    The image of number 0 is the one to be made, the others are references. Where there is no number 0 (VisualCloze),
    all are made, as one grid if they are equally wide.
    """
    if ids not in _known:
        _known[ids] = _tokens_of_ids((ids[0] if ids.ndim == 3 else ids)[:, :3].cpu())
    return _known[ids]


def _tokens_of_ids(ids: torch.Tensor) -> Tokens:
    images = [ids[ids[:, 0] == number] for number in ids[:, 0].unique_consecutive()]
    grids = [_grid(image) for image in images]
    if ids[0, 0] == 0 or len(images) == 1:
        return Tokens(grids[0], len(ids) - len(images[0]))
    widths = {width for _, _, width in grids}
    height, width = (len(ids) // min(widths), min(widths)) if len(widths) == 1 else (1, len(ids))
    return Tokens((1, height, width))


def _grid(ids: torch.Tensor) -> Grid:
    """Of one image. Rows are told by the length of the first one: in bfloat16, high numbers of rows are not exact."""
    width = int((ids[:, 1] == ids[0, 1]).int().cumprod(0).sum())
    return (1, len(ids) // width, width) if len(ids) % width == 0 else (1, 1, len(ids))


def tokens_of_shapes(shapes: Sequence[Any]) -> Tokens:
    """Of the shapes (frames, height, width) of the batch's first entry: the image, then those that are edited."""
    first = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    image, *edited = (tuple(shape) for shape in first)
    return Tokens(image, sum(frames * height * width for frames, height, width in edited))


def grid_of_coordinates(coordinates: torch.Tensor) -> Grid:
    """Of [B, 3, N] or [B, 3, N, 2] coordinates (time, row, column); a row of tokens if they are no grid."""
    if coordinates not in _known:
        first = coordinates[0].cpu()
        first = first[..., 0] if first.ndim == 3 else first
        frames, height, width = (len(axis.unique()) for axis in first)
        whole = frames * height * width == first.shape[1]
        _known[coordinates] = (frames, height, width) if whole else (1, 1, first.shape[1])
    return _known[coordinates]
