"""HunyuanVideo, HunyuanVideo-1.5 and HunyuanImage: text behind the video, its padding last."""

from typing import Any, ClassVar

from pointillist.accel.models.family import Family, Preset


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
    PRESET = Preset(0.2, 0.95, "Sparse VideoGen keeps 0.20 to 0.25, with 4 % to 10 % of the steps dense")

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
