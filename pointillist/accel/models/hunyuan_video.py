"""HunyuanVideo, HunyuanVideo-1.5 and HunyuanImage: text behind the video, its padding last."""

from typing import Any, ClassVar

from pointillist.accel.models.family import Family, Named, Preset, Tokens, latent_grid


class HunyuanVideo(Family):
    NAME = "HunyuanVideo"
    CLASSES = ("HunyuanVideoTransformer3DModel",)
    SITES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("transformer_blocks", "attn"),
        ("single_transformer_blocks", "attn"),
    )
    PROCESSORS = ("HunyuanVideoAttnProcessor2_0",)
    TEXT = "after"
    MASKED = True
    PRESET = Preset(density=0.2, dense_above=0.95, min_tokens=8192)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, C, F, H, W]."""
        config = transformer.config
        return Tokens(latent_grid(call["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size)))

    def output_weight(self, block: Any, attention: Any) -> Any:
        """Single blocks project the outputs of attention and MLP together; attention's are the first columns."""
        if getattr(attention, "to_out", None) is not None:
            return attention.to_out[0].weight
        return block.proj_out.weight[:, : attention.to_q.out_features]


class HunyuanVideo15(HunyuanVideo):
    """Image, byT5 and language-model tokens with the valid ones first; a mask of S × S is made in every layer."""

    NAME = "HunyuanVideo-1.5"
    CLASSES = ("HunyuanVideo15Transformer3DModel",)
    SITES = (("transformer_blocks", "attn"),)
    PROCESSORS = ("HunyuanVideo15AttnProcessor2_0",)
