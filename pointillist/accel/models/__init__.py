"""Model families: where a transformer's self-attentions are, and how its tokens lie. One module each."""

from types import ModuleType

import torch

from pointillist.accel.models import other, wan

SUPPORTED = "WanTransformer3DModel"


def family_of(transformer: torch.nn.Module) -> ModuleType | None:
    """The module of the family that `transformer` belongs to; `other` where only caching is known; None if nothing."""
    return next((family for family in (wan, other) if family.is_member(transformer)), None)
