"""CogVideoX and CogVideoX-1.5, and ConsisID on it: text before the video, latents frame first."""

from typing import Any

from pointillist.accel.models.family import Family, Named, Preset, Tokens


class CogVideoX(Family):
    NAME = "CogVideoX"
    CLASSES = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS = ("CogVideoXAttnProcessor2_0",)
    TEXT = "before"
    PRESET = Preset(0.25, 0.95, "none published for pooled selection; between Wan's and LTX's")

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, F, C, H, W]; 1.5 pads frames to whole patches."""
        frames, _, height, width = call["hidden_states"].shape[1:]
        patch, patch_t = transformer.config.patch_size, getattr(transformer.config, "patch_size_t", None) or 1
        return Tokens((-(-frames // patch_t), height // patch, width // patch))
