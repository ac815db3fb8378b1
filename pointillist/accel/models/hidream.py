"""HiDream-I1, a mixture of experts: text behind the image. Images that are not square are padded to a fixed length with
zero keys, which the model's own attention sees; so they count as text here, and stay exact."""

from typing import Any

import torch

from pointillist.accel.models.family import Family, Named, Tokens


class HiDream(Family):
    NAME = "HiDream-I1"
    CLASSES = ("HiDreamImageTransformer2DModel",)
    SITES = (("double_stream_blocks", "block.attn1"), ("single_stream_blocks", "block.attn1"))
    PROCESSORS = ("HiDreamAttnProcessor",)
    TEXT = "after"

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of latents [B, C, H, W], or of images that were cut into patches before."""
        if call["hidden_states"].ndim == 4:
            return super().tokens(transformer, call)
        height, width = (int(each) for each in call["img_sizes"][0])
        return Tokens((1, height, width))

    def output_weight(self, block: Any, attention: Any) -> torch.Tensor:
        return attention.to_out.weight
