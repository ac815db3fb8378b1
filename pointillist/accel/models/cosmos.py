"""Cosmos 1, 2 and 2.5: worlds from text, image and video."""

from pointillist.accel.models.family import Family, Preset


class Cosmos(Family):
    NAME = "Cosmos"
    CLASSES = ("CosmosTransformer3DModel",)
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS = ("CosmosAttnProcessor2_0",)
    PRESET = Preset(0.25, 0.95, "Sparse VideoGen keeps 0.25, with 30 % of the steps dense")
