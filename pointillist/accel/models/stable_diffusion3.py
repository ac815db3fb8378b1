"""Stable Diffusion 3 and 3.5, whose first blocks have a second self-attention over the image alone."""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.models.family import Family
from pointillist.accel.models.rows import Rows, take


class StableDiffusion3(Family):
    NAME = "Stable Diffusion 3"
    CLASSES = ("SD3Transformer2DModel",)
    SITES = (("transformer_blocks", "attn"), ("transformer_blocks", "attn2"))
    PROCESSORS = ("JointAttnProcessor2_0",)
    TEXT = "after"

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        return take(transformer.pos_embed, transformer.proj_out, rows, full, {})
