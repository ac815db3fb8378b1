"""PixArt-α and PixArt-Σ."""

from typing import Any

from pointillist.accel.models.family import Family, Named, Preset, Tokens, latent_grid


class PixArt(Family):
    NAME = "PixArt"
    CLASSES = ("PixArtTransformer2DModel",)
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS = ("AttnProcessor2_0",)
    PRESET = Preset(density=0.3, dense_above=0.9, min_tokens=4096)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, C, H, W]."""
        patch = transformer.config.patch_size
        return Tokens(latent_grid(call["hidden_states"], (1, patch, patch)))
