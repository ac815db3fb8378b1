"""PixArt-α and PixArt-Σ."""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.models.family import Family, Named, Preset, Tokens, latent_grid
from pointillist.accel.models.rows import Rows, take


class PixArt(Family):
    NAME = "PixArt"
    CLASSES = ("PixArtTransformer2DModel",)
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS = ("AttnProcessor2_0",)
    PRESET = Preset(density=0.3, dense_above=0.9, min_tokens=8192)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, C, H, W]."""
        patch = transformer.config.patch_size
        return Tokens(latent_grid(call["hidden_states"], (1, patch, patch)))

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        return take(transformer.pos_embed, transformer.proj_out, rows, full, {})
