"""Flux, Flux 2, Chroma, and VisualCloze on Flux: text before the image; reference images stand behind it."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from pointillist.accel.models.family import Family, Named, Tokens
from pointillist.accel.models.positions import tokens_of_ids
from pointillist.accel.models.rows import Rows, take


class Packed(Family):
    """What they share: packed latents, whose positions say where they are."""

    SITES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("transformer_blocks", "attn"),
        ("single_transformer_blocks", "attn"),
    )
    TEXT = "before"

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of the positions [S, 3] of all image tokens."""
        return tokens_of_ids(call["img_ids"])

    def latent_channels(self, transformer: Any) -> int:
        return int(transformer.config.out_channels or transformer.config.in_channels)


class Flux(Packed):
    NAME = "Flux"
    CLASSES: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)
    PROCESSORS = ("FluxAttnProcessor",)
    SHARED_ROWS = True

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        images = 0

        def embedded(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            nonlocal images
            images = output.shape[1]

        def tables(output: Any, index: torch.Tensor) -> Any:
            """Of text and image, the same for the whole batch."""
            text = output[0].shape[0] - images
            return tuple(torch.cat([table[:text], table[text:][index[0]]]) for table in output)

        watching = transformer.x_embedder.register_forward_hook(embedded)  # before rows are taken
        taking = take(transformer.x_embedder, transformer.proj_out, rows, full, {transformer.pos_embed: tables})

        def undo() -> None:
            taking()
            watching.remove()

        return undo

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


class Flux2(Packed):
    """Positions are [B, S, 4]; single blocks compute queries, keys, values and MLP at once.

    No regions: positions of image and text are embedded one after the other, so a hook cannot tell them apart.
    """

    NAME = "Flux 2"
    CLASSES = ("Flux2Transformer2DModel",)
    PROCESSORS = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")

    def output_weight(self, block: Any, attention: Any) -> torch.Tensor:
        if isinstance(attention.to_out, torch.nn.Linear):
            return attention.to_out.weight[:, : attention.inner_dim]
        return attention.to_out[0].weight
