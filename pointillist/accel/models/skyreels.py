"""SkyReels-V2. With diffusion forcing it masks frames causally; then it is left dense."""

from typing import Any

import torch

from pointillist.accel.models.family import Family, Named, Preset, Tokens, latent_grid


class SkyReels(Family):
    NAME = "SkyReels-V2"
    CLASSES = ("SkyReelsV2Transformer3DModel",)
    SITES = (("blocks", "attn1"),)
    PROCESSORS = ("SkyReelsV2AttnProcessor",)
    PRESET = Preset(density=0.2, dense_above=0.95, min_tokens=8192)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, C, F, H, W]."""
        return Tokens(latent_grid(call["hidden_states"], transformer.config.patch_size))

    def timestep(self, call: Named) -> torch.Tensor:
        """[B] or, with diffusion forcing, [B, F]: the noisiest frame's. Copies of the scheduler take its steps."""
        return call["timestep"]
