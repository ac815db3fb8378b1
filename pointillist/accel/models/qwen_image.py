"""Qwen-Image and its edit models: text before the image, images to edit behind it. NucleusMoE-Image: queries of the
image alone, which see its keys and those of the text behind them."""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.models.family import Family, Named, Tokens
from pointillist.accel.models.positions import tokens_of_shapes
from pointillist.accel.models.rows import Rows, take


class QwenImage(Family):
    NAME = "Qwen-Image"
    CLASSES = ("QwenImageTransformer2DModel",)
    PROCESSORS = ("QwenDoubleStreamAttnProcessor2_0",)
    TEXT = "before"
    MASKED = True
    SHARED_ROWS = True

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        return tokens_of_shapes(call["img_shapes"])

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        def tables(output: Any, index: torch.Tensor) -> Any:
            image, text = output
            return image[index[0]], text

        return take(transformer.img_in, transformer.proj_out, rows, full, {transformer.pos_embed: tables})


class NucleusMoE(Family):
    """No regions: experts choose among all tokens of an image, so a part of them would be routed otherwise."""

    NAME = "NucleusMoE-Image"
    CLASSES = ("NucleusMoEImageTransformer2DModel",)
    PROCESSORS = ("NucleusMoEAttnProcessor2_0",)
    TEXT = "after"
    MASKED = True

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        return tokens_of_shapes(call["img_shapes"])
