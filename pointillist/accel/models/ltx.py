"""LTX-Video and the video of LTX-2: latents are packed into tokens, the text is in cross-attention."""

from typing import Any

import torch

from pointillist.accel.models.family import Family, Named, Preset, Tokens
from pointillist.accel.models.positions import grid_of_coordinates


class LTX(Family):
    NAME = "LTX-Video"
    CLASSES = ("LTXVideoTransformer3DModel",)
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS = ("LTXVideoAttnProcessor", "LTXVideoAttentionProcessor2_0")
    PRESET = Preset(density=0.3, dense_above=0.95, min_tokens=4096)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of tokens [B, S, C] and the grid that the pipeline names, or else of their coordinates [B, 3, S, …]."""
        named = tuple(call.get(each) for each in ("num_frames", "height", "width"))
        config = transformer.config
        if None not in named:
            patch = (config.patch_size_t, config.patch_size, config.patch_size)
            frames, height, width = (length // size for length, size in zip(named, patch, strict=True))
            return Tokens((frames, height, width))
        return Tokens(grid_of_coordinates(call["video_coords"]))

    def latent_channels(self, transformer: Any) -> int:
        return int(transformer.config.in_channels)


class LTX2(LTX):
    """Only the video's self-attention is sparse; that of the audio is short."""

    NAME = "LTX-2"
    CLASSES = ("LTX2VideoTransformer3DModel",)
    PROCESSORS = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")

    def output_weight(self, block: Any, attention: Any) -> torch.Tensor:
        return attention.to_out[0].weight
