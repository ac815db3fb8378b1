"""SkyReels-V2. With diffusion forcing it masks frames causally; then it is left dense."""

import torch

from pointillist.accel.models.family import Family, Named, Preset


class SkyReels(Family):
    NAME = "SkyReels-V2"
    CLASSES = ("SkyReelsV2Transformer3DModel",)
    SITES = (("blocks", "attn1"),)
    PROCESSORS = ("SkyReelsV2AttnProcessor",)
    PRESET = Preset(0.2, 0.95, "Wan's, whose architecture it has")

    def timestep(self, call: Named) -> torch.Tensor:
        """[B] or, with diffusion forcing, [B, F]: the noisiest frame's. Copies of the scheduler take its steps."""
        return call["timestep"]
