"""Qwen-Image and its edit models: text before the image, images to edit behind it. NucleusMoE-Image: queries of the
image alone, which see its keys and those of the text behind them."""

from typing import Any

from pointillist.accel.models.family import Family, Named, Preset, Tokens


class QwenImage(Family):
    NAME = "Qwen-Image"
    CLASSES = ("QwenImageTransformer2DModel",)
    PROCESSORS = ("QwenDoubleStreamAttnProcessor2_0",)
    TEXT = "before"
    MASKED = True
    PRESET = Preset(density=0.3, dense_above=0.9, min_tokens=4096)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of the shapes (frames, height, width) of the batch's first entry: the image, then those that are edited."""
        shapes = call["img_shapes"]
        first = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
        image, *edited = (tuple(shape) for shape in first)
        return Tokens(image, sum(frames * height * width for frames, height, width in edited))


class NucleusMoE(QwenImage):
    NAME = "NucleusMoE-Image"
    CLASSES = ("NucleusMoEImageTransformer2DModel",)
    PROCESSORS = ("NucleusMoEAttnProcessor2_0",)
    TEXT = "after"
