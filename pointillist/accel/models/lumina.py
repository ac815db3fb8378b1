"""Lumina-Next, and Lumina 2 (Lumina-Image 2.0), where every caption has its own length before the image."""

from pointillist.accel.models.family import Family


class LuminaNext(Family):
    NAME = "Lumina-Next"
    CLASSES = ("LuminaNextDiT2DModel",)
    SITES = (("layers", "attn1"),)
    PROCESSORS = ("LuminaAttnProcessor2_0",)
    MASKED = True


class Lumina2(LuminaNext):
    NAME = "Lumina 2"
    CLASSES = ("Lumina2Transformer2DModel",)
    SITES = (("layers", "attn"),)
    PROCESSORS = ("Lumina2AttnProcessor2_0",)
    TEXT = "before"
    PACKED = True
