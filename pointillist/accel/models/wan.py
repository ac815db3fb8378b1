"""Wan 2.1 and 2.2 text-to-video and image-to-video, and models of their architecture."""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.models import fingerprints
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.schedule import Schedule
from pointillist.accel.tiles import Grid

PRESET = Plan(
    name="preset of the family Wan",
    table=((Rule("pooled", 0.2),),),
    tail="pooled",
    schedule=Schedule(dense_above=0.95),
    min_tokens=1024,
)


def is_member(transformer: torch.nn.Module) -> bool:
    from diffusers import WanTransformer3DModel

    return isinstance(transformer, WanTransformer3DModel)


def sites(transformer: Any) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """(block, its self-attention) of every layer. Cross-attention (`attn2`) is never sparse."""
    return [(block, block.attn1) for block in transformer.blocks]


def modules(transformer: Any) -> list[dict[str, list[torch.nn.Module]]]:
    """Of every layer, its self-attention and its feed-forward network: what a cache table speaks of."""
    return [{"attention": [block.attn1], "mlp": [block.ffn]} for block in transformer.blocks]


def site_name(layer: int) -> str:
    """The site's module path inside the transformer."""
    return f"blocks.{layer}.attn1"


def heads(transformer: Any) -> int:
    return transformer.config.num_attention_heads


def output_weight(attention: Any) -> torch.Tensor:
    """[C, H·D]: the projection of all heads' outputs."""
    return attention.to_out[0].weight


def inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden_states` [B, C, F, H, W] and `timestep` [B] or [B, S] from the arguments of a forward call."""
    named = dict(zip(("hidden_states", "timestep"), args, strict=False)) | kwargs
    return named["hidden_states"], named["timestep"]


def grid(transformer: Any, hidden_states: torch.Tensor) -> Grid:
    """The token grid of latents [B, C, F, H, W]."""
    frames, height, width = hidden_states.shape[2:]
    patch_t, patch_h, patch_w = transformer.config.patch_size
    return frames // patch_t, height // patch_h, width // patch_w


def hoist(transformer: Any, order: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
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


def latent_channels(transformer: Any) -> int:
    """Of what goes in, so many first channels are the clip; the others are conditions."""
    return transformer.config.out_channels


def take_rows(
    transformer: Any,
    rows: Callable[[], torch.Tensor | None],
    full: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[], None]:
    """Let only some tokens run through the layers and the head. Returns the undo.

    Args:
        rows: gives, in the running call, int64 [B, n] the tokens to compute, or None for all.
        full: makes the output of all tokens [B, N, C] of that of the computed ones [B, n, C].
    """

    @torch.compiler.disable
    def embedded(module: torch.nn.Module, args: tuple[Any, ...], patches: torch.Tensor) -> torch.Tensor | None:
        index = rows()
        if index is None:
            return None
        tokens = patches.flatten(2)
        chosen = tokens.gather(2, index[:, None].expand(-1, tokens.shape[1], -1))
        return chosen[..., None, None]

    @torch.compiler.disable
    def rotary(module: torch.nn.Module, args: tuple[Any, ...], tables: Any) -> Any:
        index = rows()
        return tables if index is None else tuple(table[0][index] for table in tables)

    @torch.compiler.disable
    def conditioned(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        embedding, projection, *others = output
        index = rows()
        if index is None or projection.ndim != 3:  # one timestep for all tokens
            return output
        parts = (x.gather(1, index[..., None].expand(-1, -1, x.shape[2])) for x in (embedding, projection))
        return *parts, *others

    @torch.compiler.disable
    def projected(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        return full(out)

    hooks = [
        transformer.patch_embedding.register_forward_hook(embedded),
        transformer.rope.register_forward_hook(rotary),
        transformer.condition_embedder.register_forward_hook(conditioned),
        transformer.proj_out.register_forward_hook(projected),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


def watch_modulation(transformer: Any, tell: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Call `tell` in every forward pass with the timestep's projection that modulates the blocks. Returns the undo."""

    @torch.compiler.disable
    def conditioned(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tell(output[1])

    return transformer.condition_embedder.register_forward_hook(conditioned).remove


def fingerprint(transformer: Any) -> str:
    """Names the architecture: equal for fine-tunes of a model, different for another size of it."""
    config = transformer.config
    shape = f"{config.num_layers}x{config.num_attention_heads}x{config.attention_head_dim}"
    return f"wan-{shape}-{fingerprints.digest(transformer)}"
