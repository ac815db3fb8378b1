"""Lumina-Next, and Lumina 2 (Lumina-Image 2.0), where every caption has its own length before the image."""

from typing import Any

from pointillist.accel.models.family import Family, Named, Preset, Tokens, latent_grid


class LuminaNext(Family):
    NAME = "Lumina-Next"
    CLASSES = ("LuminaNextDiT2DModel",)
    SITES = (("layers", "attn1"),)
    PROCESSORS = ("LuminaAttnProcessor2_0",)
    MASKED = True
    PRESET = Preset(density=0.3, dense_above=0.9, min_tokens=8192)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, C, H, W]."""
        patch = transformer.config.patch_size
        return Tokens(latent_grid(call["hidden_states"], (1, patch, patch)))


class Lumina2(LuminaNext):
    NAME = "Lumina 2"
    CLASSES = ("Lumina2Transformer2DModel",)
    SITES = (("layers", "attn"),)
    PROCESSORS = ("Lumina2AttnProcessor2_0",)
    TEXT = "before"
    PACKED = True
