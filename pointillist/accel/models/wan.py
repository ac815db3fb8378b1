"""Wan 2.1 and 2.2 (text, image and VACE conditions, both experts, a timestep for each token), and models like them."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from pointillist.accel.models import fingerprints
from pointillist.accel.models.family import Family, Named, Preset
from pointillist.accel.models.rows import Rows, gathered, take


class WanVACE(Family):
    """With blocks of their own for what a clip is made to follow."""

    NAME = "Wan VACE"
    CLASSES: ClassVar[tuple[str, ...]] = ("WanVACETransformer3DModel",)
    SITES: ClassVar[tuple[tuple[str, str], ...]] = (("blocks", "attn1"), ("vace_blocks", "attn1"))
    PROCESSORS = ("WanAttnProcessor", "WanAttnProcessor2_0")
    PRESET = Preset(
        0.2, 0.95, "Sparse VideoGen keeps 0.30, 20 % to 35 % of the steps dense; DFSAttn 0.3 to 0.1", min_tokens=1024
    )

    def timestep(self, call: Named) -> torch.Tensor:
        """[B] or [B, S]."""
        return call["timestep"]


class Wan(WanVACE):
    NAME = "Wan"
    CLASSES = ("WanTransformer3DModel",)
    SITES = (("blocks", "attn1"),)

    def modules(self, transformer: Any) -> list[dict[str, list[torch.nn.Module]]]:
        return [{"attention": [block.attn1], "mlp": [block.ffn]} for block in transformer.blocks]

    def hoist(self, transformer: Any, order: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        """Let the video's tokens run through all layers in another order. Returns the undo.

        Hidden states, rotary embeddings and embeddings of a timestep per token are put into the order before the first
        layer; hidden states come back after the last (Jenga). So a static order costs nothing in the layers.

        Args:
            order: gives, on the running call's device, int64 [S] the token at each place, and the place of each token.
        """

        @torch.compiler.disable
        def embedded(module: torch.nn.Module, args: tuple[Any, ...], patches: torch.Tensor) -> torch.Tensor:
            return patches.flatten(2).index_select(2, order()[0].to(patches.device)).view(patches.shape)

        @torch.compiler.disable
        def rotary(module: torch.nn.Module, args: tuple[Any, ...], tables: Any) -> Any:
            return tuple(table.index_select(1, order()[0].to(table.device)) for table in tables)

        @torch.compiler.disable
        def conditioned(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            embedding, projection, *others = output
            if projection.ndim != 3:  # one timestep for all tokens
                return output
            return embedding, projection.index_select(1, order()[0].to(projection.device)), *others

        @torch.compiler.disable
        def back(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].index_select(1, order()[1].to(args[0].device)), *args[1:])

        hooks = [
            transformer.patch_embedding.register_forward_hook(embedded),
            transformer.rope.register_forward_hook(rotary),
            transformer.condition_embedder.register_forward_hook(conditioned),
            transformer.norm_out.register_forward_pre_hook(back),
        ]

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        return undo

    def latent_channels(self, transformer: Any) -> int:
        """Of what goes in, so many first channels are the clip; the others are conditions."""
        return transformer.config.out_channels

    def take_rows(
        self, transformer: Any, rows: Rows, full: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        def patches(output: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            """[B, C, F, H, W], which is flattened behind the module."""
            tokens = output.flatten(2)
            return tokens.gather(2, index[:, None].expand(-1, tokens.shape[1], -1))[..., None, None]

        def tables(output: Any, index: torch.Tensor) -> Any:
            return tuple(table[0][index] for table in output)

        def modulation(output: Any, index: torch.Tensor) -> Any:
            embedding, projection, *others = output
            if projection.ndim != 3:  # one timestep for all tokens
                return output
            return gathered(embedding, index), gathered(projection, index), *others

        others: dict[torch.nn.Module, Callable[[Any, torch.Tensor], Any]] = {
            transformer.rope: tables,
            transformer.condition_embedder: modulation,
        }
        return take(transformer.patch_embedding, transformer.proj_out, rows, full, others, patches)

    def watch_modulation(self, transformer: Any, tell: Callable[[torch.Tensor], None]) -> Callable[[], None]:
        """With the timestep's projection."""

        @torch.compiler.disable
        def conditioned(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tell(output[1])

        return transformer.condition_embedder.register_forward_hook(conditioned).remove

    def fingerprint(self, transformer: Any) -> str:
        """Names the architecture: equal for fine-tunes of a model, different for another size of it."""
        config = transformer.config
        shape = f"{config.num_layers}x{config.num_attention_heads}x{config.attention_head_dim}"
        return f"wan-{shape}-{fingerprints.digest(transformer)}"
