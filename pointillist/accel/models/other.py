"""Any other transformer of Diffusers: its attention stays as it is, its steps can be cached."""

import inspect
from typing import Any, ClassVar

from pointillist.accel.models.family import Family, Named, Tokens


class Other(Family):
    NAME = "other"
    CLASSES: ClassVar[tuple[str, ...]] = ()
    SITES: ClassVar[tuple[tuple[str, str], ...]] = ()
    PROCESSORS: ClassVar[tuple[str, ...]] = ()

    def is_member(self, transformer: Any) -> bool:
        """Whether it is a model of Diffusers that is called with latents and a timestep."""
        named = inspect.signature(transformer.forward).parameters
        return hasattr(transformer, "config") and {"hidden_states", "timestep"} <= set(named)

    def heads(self, transformer: Any) -> int:
        return 0

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """How they lie is not known: their number, if they are in a row."""
        x = self.latents(call)
        return Tokens((1, 1, x.shape[1] if x.ndim == 3 else x[0, 0].numel()))


class Sana(Other):
    """Sana and Sana-Video: self-attention is linear, and the feed-forward networks are convolutions over the grid."""

    NAME = "Sana"
    CLASSES = ("SanaTransformer2DModel", "SanaVideoTransformer3DModel", "SanaControlNetModel")
    WHY = "its self-attention is linear already, so there are no pairs to leave out"

    def is_member(self, transformer: Any) -> bool:
        return Family.is_member(self, transformer)
