"""Cosmos 1, 2 and 2.5: worlds from text, image and video."""

from typing import Any

from pointillist.accel.models.family import Family, Named, Preset, Tokens, latent_grid


class Cosmos(Family):
    NAME = "Cosmos"
    CLASSES = ("CosmosTransformer3DModel",)
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS = ("CosmosAttnProcessor2_0",)
    PRESET = Preset(density=0.25, dense_above=0.95, min_tokens=8192)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, C, F, H, W]."""
        return Tokens(latent_grid(call["hidden_states"], transformer.config.patch_size))
