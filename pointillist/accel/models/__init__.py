"""Model families: where a transformer's self-attentions are, and how its tokens lie. `family.py` says what is told."""

from typing import Any

from pointillist.accel.models.cogvideox import CogVideoX
from pointillist.accel.models.cosmos import Cosmos
from pointillist.accel.models.family import Family
from pointillist.accel.models.flux import Chroma, Flux, Flux2
from pointillist.accel.models.hidream import HiDream
from pointillist.accel.models.hunyuan_video import HunyuanVideo, HunyuanVideo15
from pointillist.accel.models.ltx import LTX, LTX2
from pointillist.accel.models.lumina import Lumina2, LuminaNext
from pointillist.accel.models.mochi import Mochi
from pointillist.accel.models.other import Other, Sana
from pointillist.accel.models.pixart import PixArt
from pointillist.accel.models.qwen_image import NucleusMoE, QwenImage
from pointillist.accel.models.skyreels import SkyReels
from pointillist.accel.models.stable_diffusion3 import StableDiffusion3
from pointillist.accel.models.wan import Wan, WanVACE
from pointillist.accel.models.z_image import ZImage

FAMILIES: list[Family] = [
    Wan(), WanVACE(), HunyuanVideo(), HunyuanVideo15(), CogVideoX(), LTX(), LTX2(), Mochi(), SkyReels(), Cosmos(),
    Flux(), Flux2(), Chroma(), StableDiffusion3(), PixArt(), QwenImage(), NucleusMoE(), LuminaNext(), Lumina2(),
    HiDream(), ZImage(),
]  # fmt: skip
"""With sparse attention."""
_OTHERS = (Sana(), Other())


def register(family: Family) -> None:
    """Add a family, or put it in place of one whose classes it has; `docs/models.md` shows how to write one.

    Raises:
        TypeError: it is no `Family`, or lacks a fact.
    """
    if not isinstance(family, Family):
        raise TypeError(f"{family!r:.80} is no Family; give an instance of a subclass of {Family.__module__}.Family")
    for fact in ("NAME", "CLASSES", "PROCESSORS"):
        if not hasattr(family, fact):
            raise TypeError(f"the family {type(family).__name__} does not say its {fact}")
    FAMILIES.insert(0, family)


def family_of(transformer: Any) -> Family | None:
    """The family that `transformer` belongs to; `Other` where only caching is known; None if nothing is."""
    return next((family for family in (*FAMILIES, *_OTHERS) if family.is_member(transformer)), None)


def supported() -> str:
    """The families with sparse attention, in words."""
    return ", ".join(dict.fromkeys(family.NAME for family in FAMILIES))
