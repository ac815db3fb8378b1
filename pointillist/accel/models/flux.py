"""Flux, Flux 2, Chroma, and VisualCloze on Flux: text before the image; reference images stand behind it."""

from typing import Any, ClassVar

import torch

from pointillist.accel.models.family import Family, Named, Preset, Tokens
from pointillist.accel.models.positions import tokens_of_ids


class Flux(Family):
    NAME = "Flux"
    CLASSES = ("FluxTransformer2DModel",)
    SITES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("transformer_blocks", "attn"),
        ("single_transformer_blocks", "attn"),
    )
    PROCESSORS: ClassVar[tuple[str, ...]] = ("FluxAttnProcessor",)
    TEXT = "before"
    PRESET = Preset(density=0.3, dense_above=0.9, min_tokens=4096)

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of the positions [S, 3] of all image tokens."""
        return tokens_of_ids(call["img_ids"])

    def output_weight(self, block: Any, attention: Any) -> torch.Tensor:
        """Single blocks project the outputs of attention and MLP together; attention's are the first columns."""
        if getattr(attention, "to_out", None) is not None:
            return attention.to_out[0].weight
        return block.proj_out.weight[:, : attention.to_q.out_features]


class Chroma(Flux):
    """A mask over text and image says which text is padding."""

    NAME = "Chroma"
    CLASSES = ("ChromaTransformer2DModel",)
    MASKED = True


class Flux2(Flux):
    """Positions are [B, S, 4]; single blocks compute queries, keys, values and MLP at once."""

    NAME = "Flux 2"
    CLASSES = ("Flux2Transformer2DModel",)
    PROCESSORS = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")

    def output_weight(self, block: Any, attention: Any) -> torch.Tensor:
        if isinstance(attention.to_out, torch.nn.Linear):
            return attention.to_out.weight[:, : attention.inner_dim]
        return attention.to_out[0].weight
