"""Where a transformer is split over processes: at its first block, and together again behind its last one.

Between them each process holds a part of the tokens; before and behind, all hold all of them. So whatever looks at
whole clips (embeddings, token orders, regions, step caches, the output's head) is as in a single process. Diffusers'
own plans split earlier and gather later, which saves an exchange of the size of one layer's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pointillist.accel import bridge
from pointillist.accel.parallel import engine
from pointillist.accel.parallel.errors import ParallelError
from pointillist.accel.parallel.tokens import part_sizes, tokens_in_a_row


@dataclass(frozen=True)
class TokenArgument:
    """An argument of every block that has an entry for each token."""

    name: str
    dim: int
    stream: str = "video"
    """Whose tokens: `video`, or `joint`, text and video as they lie in attention."""
    ndim: int | None = None
    """With another number of dimensions it has no entries for tokens; likewise where it has another length."""


@dataclass(frozen=True)
class Joint:
    """How blocks of a family take tokens."""

    text: str = "none"
    """Where the text sits in attention: `none`, `before` or `after` the video. Where it does, blocks change it, and it
    is split too."""
    arguments: tuple[TokenArgument, ...] = ()


JOINTS: dict[str, Joint] = {
    "WanTransformer3DModel": Joint(
        "none", (TokenArgument("rotary_emb", 1), TokenArgument("temb", 1, ndim=4))
    ),
    "LTXVideoTransformer3DModel": Joint(
        "none", (TokenArgument("image_rotary_emb", 1), TokenArgument("temb", 1, ndim=3))
    ),
    "FluxTransformer2DModel": Joint("before", (TokenArgument("image_rotary_emb", 0, stream="joint"),)),
    "HunyuanVideoTransformer3DModel": Joint(
        "after", (TokenArgument("freqs_cis", 0), TokenArgument("image_rotary_emb", 0))
    ),
}  # fmt: skip


def joint_of(transformer: Any) -> Joint | None:
    """How the transformer's class or one that it inherits from is split; None if that is not known."""
    return next((JOINTS[kind.__name__] for kind in type(transformer).__mro__ if kind.__name__ in JOINTS), None)


class Seam:
    """Of one transformer."""

    def __init__(self, transformer: Any, config: Any) -> None:
        """Raises ValueError for a model of which it is not known how to split it."""
        joint = joint_of(transformer)
        lists = bridge.block_lists(transformer)
        if joint is None or not lists:
            raise ValueError(
                f"a {type(transformer).__name__} cannot be split over processes; known are {', '.join(JOINTS)}"
            )
        self.config, self._joint = config, joint
        self.blocks = [block for blocks in lists.values() for block in blocks]
        ulysses, ring = engine.degrees(config)
        self.parts = ulysses * ring
        self.lengths: tuple[int, ...] = ()
        """Of the running call: tokens of the streams as they lie in attention, text and video."""
        self.uneven = False
        """Whether the running call's tokens do not divide by the processes."""
        self._inside = False
        self._local: dict[int, tuple[Any, Any]] = {}

    def install(self) -> Callable[[], None]:
        """Returns the undo."""
        first, last = self.blocks[0], self.blocks[-1]
        hooks = [first.register_forward_pre_hook(self._split, with_kwargs=True)]
        hooks += [block.register_forward_pre_hook(self._take_arguments, with_kwargs=True) for block in self.blocks]
        hooks.append(last.register_forward_hook(self._gather))

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        return undo

    def leave(self) -> None:
        """The transformer's call has ended, well or not."""
        self._inside, self.lengths = False, ()
        self._local.clear()

    def whole(
        self, streams: tuple[torch.Tensor, torch.Tensor | None], stay: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All tokens of hidden states and text [B, n, C], wherever in the running call; unless `stay`, what follows has
        all of them."""
        if not self._inside:
            return streams
        whole = self._together(*streams)
        self._inside = stay
        return whole

    @property
    def local_tokens(self) -> torch.Tensor:
        """int64: those of this process, of the streams one after the other."""
        sizes = [sum(each) for each in zip(*(part_sizes(n, self.parts) for n in self.lengths), strict=True)]
        rank = torch.distributed.get_rank(engine.process_group(self.config))
        return tokens_in_a_row(self.lengths, self.parts, torch.device("cpu")).split(sizes)[rank]

    @torch.compiler.disable
    def _split(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        streams = bridge.streams_of(block)
        hidden, text = streams.into(args, kwargs)
        if self._joint.text == "none":
            text = None
        counts = [x.shape[1] for x in (hidden, text) if x is not None]
        self.lengths = tuple(reversed(counts)) if self._joint.text == "before" else tuple(counts)
        self._check_lengths()
        self._inside = True
        changed = {streams.hidden_name: engine.shard(hidden, 1, self.config)}
        if text is not None:
            changed[streams.text_name] = engine.shard(text, 1, self.config)
        return _with(streams.parameters, args, kwargs, changed)

    def _check_lengths(self) -> None:
        ulysses, ring = engine.degrees(self.config)
        if least := [n for n in self.lengths if n < self.parts]:
            raise ParallelError(f"{least[0]} tokens cannot be split over {self.parts} processes; take fewer")
        uneven = any(n % self.parts for n in self.lengths)
        if uneven and ulysses > 1 and ring > 1:
            raise ParallelError(
                f"{' and '.join(map(str, self.lengths))} tokens do not divide by {self.parts} processes, which a ring "
                "of Ulysses groups needs; take --ulysses or --ring alone, or another size"
            )
        self.uneven = uneven
        engine.allow_uneven(self.config, uneven)

    @torch.compiler.disable
    def _take_arguments(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parameters = bridge.streams_of(block).parameters
        named = dict(zip(parameters, args, strict=False)) | kwargs
        changed = {
            each.name: self._part(each, named[each.name]) for each in self._joint.arguments if each.name in named
        }
        return _with(parameters, args, kwargs, changed)

    def _part(self, which: TokenArgument, value: Any) -> Any:
        """This process's entries of an argument, which all blocks are given alike."""
        known = self._local.get(id(value))
        if known is None or known[0] is not value:
            known = self._local[id(value)] = (value, self._part_of(which, value))
        return known[1]

    def _part_of(self, which: TokenArgument, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(self._part_of(which, each) for each in value)
        if not isinstance(value, torch.Tensor) or (which.ndim is not None and value.ndim != which.ndim):
            return value
        joint = which.stream == "joint"
        if value.shape[which.dim] != (sum(self.lengths) if joint else self._hidden_length):
            return value
        if joint:
            return value.index_select(which.dim, self.local_tokens.to(value.device))
        return engine.shard(value, which.dim, self.config)

    @torch.compiler.disable
    def _gather(self, block: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        streams = bridge.streams_of(block)
        whole = streams.give(*self._together(*streams.out_of(output)))
        self._inside = False
        return whole

    def _together(self, hidden: torch.Tensor, text: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        whole = engine.unshard(hidden, 1, self.config, self._hidden_length)
        if text is None:
            return whole, None
        return whole, engine.unshard(text, 1, self.config, sum(self.lengths) - self._hidden_length)

    @property
    def _hidden_length(self) -> int:
        """All tokens of the hidden states in the running call."""
        return self.lengths[-1] if self._joint.text == "before" else self.lengths[0]


def _with(
    parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], changed: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with some of them changed."""
    places = dict(zip(parameters, range(len(args)), strict=False))
    new_args, new_kwargs = list(args), dict(kwargs)
    for name, value in changed.items():
        if name in new_kwargs:
            new_kwargs[name] = value
        else:
            new_args[places[name]] = value
    return tuple(new_args), new_kwargs
