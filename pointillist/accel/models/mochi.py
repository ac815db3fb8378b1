"""Mochi: every batch entry attends by itself, to the video and its own valid text behind it."""

from pointillist.accel.models.family import Family, Preset


class Mochi(Family):
    NAME = "Mochi"
    CLASSES = ("MochiTransformer3DModel",)
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS = ("MochiAttnProcessor2_0",)
    TEXT = "after"
    PRESET = Preset(0.25, 0.95, "none published for pooled selection; between Wan's and LTX's")
