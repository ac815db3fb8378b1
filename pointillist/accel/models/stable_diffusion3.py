"""Stable Diffusion 3 and 3.5, whose first blocks have a second self-attention over the image alone."""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.models.family import Family, Named, Preset, Tokens, latent_grid
from pointillist.accel.models.rows import Rows, take


class StableDiffusion3(Family):
    NAME = "Stable Diffusion 3"
    CLASSES = ("SD3Transformer2DModel",)
    SITES = (("transformer_blocks", "attn"), ("transformer_blocks", "attn2"))
    PROCESSORS = ("JointAttnProcessor2_0",)
    TEXT = "after"
    PRESET = Preset(density=0.3, dense_above=0.9, min_tokens=8192)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, C, H, W]."""
        patch = transformer.config.patch_size
        return Tokens(latent_grid(call["hidden_states"], (1, patch, patch)))

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        return take(transformer.pos_embed, transformer.proj_out, rows, full, {})
