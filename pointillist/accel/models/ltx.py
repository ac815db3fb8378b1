"""LTX-Video and the video of LTX-2: latents are packed into tokens, the text is in cross-attention."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from pointillist.accel.models.family import Family, Named, Preset, Tokens
from pointillist.accel.models.positions import grid_of_coordinates
from pointillist.accel.models.rows import Rows, gathered, take


class LTX2(Family):
    """Only the video's self-attention is sparse; that of the audio is short.

    No regions: the audio sees all tokens of the video.
    """

    NAME = "LTX-2"
    CLASSES: ClassVar[tuple[str, ...]] = ("LTX2VideoTransformer3DModel",)
    SITES = (("transformer_blocks", "attn1"),)
    PROCESSORS: ClassVar[tuple[str, ...]] = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
    PRESET = Preset(0.3, 0.95, "none published; short sequences, so less is left out")

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of tokens [B, S, C] and the grid that the pipeline names, or else of their coordinates [B, 3, S, …]."""
        named = tuple(call.get(each) for each in ("num_frames", "height", "width"))
        config = transformer.config
        if None not in named:
            patch = (config.patch_size_t, config.patch_size, config.patch_size)
            frames, height, width = (length // size for length, size in zip(named, patch, strict=True))
            return Tokens((frames, height, width))
        return Tokens(grid_of_coordinates(call["video_coords"]))


class LTX(LTX2):
    NAME = "LTX-Video"
    CLASSES = ("LTXVideoTransformer3DModel",)
    PROCESSORS = ("LTXVideoAttnProcessor", "LTXVideoAttentionProcessor2_0")

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        def tables(output: Any, index: torch.Tensor) -> Any:
            return tuple(gathered(table, index) for table in output)

        def modulation(output: Any, index: torch.Tensor) -> Any:
            """Flat over batch and tokens, where every token has its own timestep."""
            if len(output[0]) == len(index):
                return output
            return tuple(gathered(x.unflatten(0, (len(index), -1)), index).flatten(0, 1) for x in output)

        others: dict[torch.nn.Module, Callable[[Any, torch.Tensor], Any]] = {
            transformer.rope: tables,
            transformer.time_embed: modulation,
        }
        return take(transformer.proj_in, transformer.proj_out, rows, full, others)
