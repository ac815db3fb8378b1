"""Model families: where a transformer's self-attentions are, and how its tokens lie. One module each."""

from types import ModuleType

import torch

from pointillist.accel.models import wan

SUPPORTED = "WanTransformer3DModel"


def family_of(transformer: torch.nn.Module) -> ModuleType | None:
    """The module of the family that `transformer` belongs to, or None if it is not supported."""
    return wan if wan.is_member(transformer) else None
