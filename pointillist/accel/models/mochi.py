"""Mochi: every batch entry attends by itself, to the video and its own valid text behind it."""

from typing import Any

from pointillist.accel.models.family import Family, Named, Preset, Tokens, latent_grid


class Mochi(Family):
    NAME = "Mochi"
    CLASSES = ("MochiTransformer3DModel",)
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS = ("MochiAttnProcessor2_0",)
    TEXT = "after"
    PRESET = Preset(density=0.25, dense_above=0.95, min_tokens=8192)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, C, F, H, W]."""
        patch = transformer.config.patch_size
        return Tokens(latent_grid(call["hidden_states"], (1, patch, patch)))
