"""Qwen-Image and its edit models: text before the image, images to edit behind it. NucleusMoE-Image: queries of the
image alone, which see its keys and those of the text behind them."""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.models.family import Family, Named, Preset, Tokens
from pointillist.accel.models.rows import Rows, take


class QwenImage(Family):
    NAME = "Qwen-Image"
    CLASSES = ("QwenImageTransformer2DModel",)
    PROCESSORS = ("QwenDoubleStreamAttnProcessor2_0",)
    TEXT = "before"
    MASKED = True
    SHARED_ROWS = True
    PRESET = Preset(density=0.3, dense_above=0.9, min_tokens=8192)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of the shapes (frames, height, width) of the batch's first entry: the image, then those that are edited."""
        shapes = call["img_shapes"]
        first = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
        image, *edited = (tuple(shape) for shape in first)
        return Tokens(image, sum(frames * height * width for frames, height, width in edited))

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        def tables(output: Any, index: torch.Tensor) -> Any:
            image, text = output
            return image[index[0]], text

        return take(transformer.img_in, transformer.proj_out, rows, full, {transformer.pos_embed: tables})


class NucleusMoE(QwenImage):
    NAME = "NucleusMoE-Image"
    CLASSES = ("NucleusMoEImageTransformer2DModel",)
    PROCESSORS = ("NucleusMoEAttnProcessor2_0",)
    TEXT = "after"

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        """Experts choose among all tokens of an image, so a part of them would be routed otherwise."""
        raise NotImplementedError

    @property
    def can_take_rows(self) -> bool:
        return False
