"""What `accelerate` must be told of a model family. Everything that families share is here, once.

A family is a subclass with a few facts; `docs/models.md` writes one. It says where the self-attentions are, where the
text sits in their sequence, and how the grid of tokens follows from the arguments of a forward call.
"""

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from pointillist.accel.models import fingerprints
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.schedule import Schedule
from pointillist.accel.tiles import Grid, Segment, whole_video

Named = Mapping[str, Any]
"""The arguments of a forward call by name."""


@dataclass(frozen=True)
class Tokens:
    """What a forward call says of its tokens."""

    grid: Grid
    conditions: int = 0
    """So many tokens behind the video are neither video nor text: reference images."""


@dataclass(frozen=True)
class Preset:
    """How a family is accelerated where no plan was searched: cautious values, as the literature gives them."""

    density: float
    dense_above: float
    """Steps whose share of the noise is above it are dense."""
    source: str
    """Where the values come from."""
    min_tokens: int = 8192
    """Fewer tokens are left dense: at 4,096 choosing costs what it saves (cost model of an H200 and an RTX 4090)."""


IMAGE = Preset(0.3, 0.9, "PISA shows Flux at 0.15 with its first layers dense; this is half of that saving")


class Family:
    """A model family. All values below are defaults, and those of an image model without text in its sequence."""

    NAME: ClassVar[str]
    CLASSES: ClassVar[tuple[str, ...]]
    """Of Diffusers, by name; their subclasses belong too."""
    SITES: ClassVar[tuple[tuple[str, str], ...]] = (("transformer_blocks", "attn"),)
    """Lists of blocks in the order of the forward pass, and the self-attention in each block; a block without it has
    none."""
    PROCESSORS: ClassVar[tuple[str, ...]]
    """Attention processors that call attention once; others (IP-Adapters) are refused."""
    TEXT: ClassVar[str] = "none"
    """Where the text sits in the sequence of a self-attention: `none`, `before` or `after` the video."""
    MASKED: ClassVar[bool] = False
    """Whether a mask that is given says which keys are padding, so that sparse attention can leave them out."""
    PACKED: ClassVar[bool] = False
    """Whether padding is the end of the sequence although the text is before the video (in batches of unequal texts the
    video then begins at unequal places)."""
    SHARED_ROWS: ClassVar[bool] = False
    """Whether all entries of a batch compute the same tokens in region steps, as they share their positions."""
    PRESET: ClassVar[Preset] = IMAGE

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """The tokens of a forward call; by default, patches of latents as the transformer's config cuts them."""
        return Tokens(latent_grid(self.latents(call), transformer.config))

    def is_member(self, transformer: Any) -> bool:
        return any(kind.__name__ in self.CLASSES for kind in type(transformer).__mro__)

    def sites(self, transformer: Any) -> list[tuple[torch.nn.Module, Any]]:
        """(the module that runs before it, the self-attention) of every layer. Cross-attention is never sparse."""
        return [(block, attention) for _, block, attention in self._each(transformer)]

    def site_names(self, transformer: Any) -> list[str]:
        """Module paths of the sites inside the transformer."""
        return [name for name, _, _ in self._each(transformer)]

    def _each(self, transformer: Any) -> list[tuple[str, torch.nn.Module, Any]]:
        found: list[tuple[str, torch.nn.Module, Any]] = []
        for blocks, path in self.SITES:
            for number, block in enumerate(getattr(transformer, blocks, None) or ()):
                try:
                    attention = block.get_submodule(path)
                except AttributeError:  # SD3.5: some blocks have a second one
                    continue
                # the first site of a block is announced by the block itself: see `bridge`
                first = not any(earlier is block for _, earlier, _ in found)
                found.append((f"{blocks}.{number}.{path}", block if first else attention, attention))
        return found

    def modules(self, transformer: Any) -> list[dict[str, list[torch.nn.Module]]]:
        """Of every layer, its self-attention and its feed-forward networks: what a cache table speaks of. Raises
        ValueError where they are not apart."""
        from pointillist.accel import bridge  # which imports Diffusers, and plans are read without it

        return bridge.attention_and_mlp(transformer)

    def heads(self, transformer: Any) -> int:
        return int(transformer.config.num_attention_heads)

    def output_weight(self, block: Any, attention: Any) -> torch.Tensor:
        """[C, H·D]: the projection of all heads' outputs."""
        return attention.to_out[0].weight

    def named(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Named:
        """The arguments of a forward call by name."""
        kind: Any = type(transformer)
        return dict(zip(_parameters(kind), args, strict=False)) | kwargs

    def latents(self, call: Named) -> torch.Tensor:
        """What goes in to be denoised."""
        return call["hidden_states"]

    def timestep(self, call: Named) -> torch.Tensor | None:
        """In the scheduler's units; None: the steps that the scheduler has taken are counted."""
        return None

    def segments(self, tokens: Tokens, length: int) -> tuple[Segment, ...] | None:
        """How the tokens lie in a self-attention of `length` tokens; None if they cannot be those of the grid."""
        video = whole_video(tokens.grid)[0].length
        rest = length - video
        if rest == 0:
            return whole_video(tokens.grid)
        text = rest - tokens.conditions
        if text < 0 or (self.TEXT == "none" and text):
            return None
        parts = [("video", video), ("condition", tokens.conditions)]
        parts.insert(0 if self.TEXT == "before" else 2, ("text", text))
        found, start = [], 0
        for kind, size in parts:
            if size:
                found.append(Segment(kind, start, size))
            start += size
        return tuple(found)

    def hoist(self, transformer: Any, order: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        """Let the video's tokens run through all layers in another order. Returns the undo.

        Args:
            order: gives, on the running call's device, int64 [S] the token at each place, and the place of each token.
        """
        raise NotImplementedError

    @property
    def can_hoist(self) -> bool:
        return type(self).hoist is not Family.hoist

    def take_rows(
        self,
        transformer: Any,
        rows: Callable[[], torch.Tensor | None],
        full: Callable[[torch.Tensor], torch.Tensor],
    ) -> Callable[[], None]:
        """Let only some tokens run through the layers and the head. Returns the undo.

        Args:
            rows: gives, in the running call, int64 [B, n] the tokens to compute, or None for all.
            full: makes the output of all tokens [B, N, C] of that of the computed ones [B, n, C].
        """
        raise NotImplementedError

    @property
    def can_take_rows(self) -> bool:
        return type(self).take_rows is not Family.take_rows

    def latent_channels(self, transformer: Any) -> int:
        """Of what goes in, so many first channels are the clip; the others are conditions."""
        return int(transformer.config.in_channels)

    def watch_modulation(self, transformer: Any, tell: Callable[[torch.Tensor], None]) -> Callable[[], None]:
        """Call `tell` in every forward pass with what modulates the blocks, where that is known. Returns the undo."""
        return lambda: None

    def preset(self, transformer: Any) -> Plan:
        """The plan where none was searched."""
        return Plan(
            name=f"preset of the family {self.NAME}",
            table=((Rule("pooled", self.PRESET.density),),),
            tail="pooled",
            schedule=Schedule(dense_above=self.PRESET.dense_above),
            min_tokens=self.PRESET.min_tokens,
        )

    def fingerprint(self, transformer: Any) -> str:
        """Names the architecture: equal for fine-tunes of a model, different for another size of it."""
        return f"{type(transformer).__name__}-{fingerprints.digest(transformer)}"


@lru_cache(maxsize=64)
def _parameters(kind: Hashable) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def latent_grid(latents: torch.Tensor, config: Any) -> Grid:
    """The grid of latents [B, C, F, H, W], or of an image's [B, C, H, W], in patches of a transformer's config.

    Raises:
        TypeError: they are something else, or the config says nothing of patches: the family must define `tokens`.
    """
    size: Any = getattr(config, "patch_size", None)
    patch = (getattr(config, "patch_size_t", None) or 1, size, size) if isinstance(size, int) else tuple(size or ())
    if latents.ndim not in (4, 5) or len(patch) != 3:
        raise TypeError(
            f"how tokens follow from latents {list(latents.shape)} is not known: define tokens() in the model's family"
        )
    frames, height, width = latents.shape[2:] if latents.ndim == 5 else (1, *latents.shape[2:])
    return frames // patch[0], height // patch[1], width // patch[2]
