"""PixArt-α and PixArt-Σ."""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.models.family import Family
from pointillist.accel.models.rows import Rows, take


class PixArt(Family):
    NAME = "PixArt"
    CLASSES = ("PixArtTransformer2DModel",)
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS = ("AttnProcessor2_0",)

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        return take(transformer.pos_embed, transformer.proj_out, rows, full, {})
