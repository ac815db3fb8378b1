"""What every pattern is: from one attention call to the pairs of blocks of the video that it keeps."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Self

import torch

from pointillist.accel.blocks import Blocks, block_means, blocks_in, places_in
from pointillist.accel.tiles import Grid, Segment
from pointillist.kernels import BlockLayout, Means, block_sparse_attention, pool_blocks

LSE_BLOCK = 256
"""Queries in a block where everything is computed."""


@dataclass(frozen=True)
class Call:
    """One attention call as a pattern sees it: final q, k and v of its heads, and where the run is."""

    q: torch.Tensor
    """[B, H, S, D], all tokens of `segments`."""
    k: torch.Tensor
    """[B, H, Sk, D], without the tokens of `pad` segments; v likewise."""
    v: torch.Tensor
    scale: float
    grid: Grid
    segments: tuple[Segment, ...]
    block: int = 128
    """At most so many tokens are in a block."""
    key_lengths: torch.Tensor | None = None
    """int64 [B]: so many keys of each batch entry are no padding, where they differ; padding is the end then."""
    hoist: str = ""
    """The order in which the video's tokens lie in q, k and v: "" is the grid's, else it was hoisted (see `Plan`)."""
    heads: tuple[int, ...] | None = None
    """Which of the site's heads these are; None is all."""
    layer: int = 0
    step: int = 0
    """Index of the denoising step, of `steps`; 0 outside of a generation."""
    steps: int = 1
    memory: dict[Any, Any] = field(default_factory=dict)
    """What the pattern wants to find again at this site, in this branch and generation, for these heads."""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Trained tensors of this site by name, for methods that are trained: see `accel/trained.py`."""
    hidden_states: torch.Tensor | None = None
    """[B, S, C]: what went into the attention module, where a method's trained gate needs it."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """See `once`."""
    backend: str = "auto"
    """Of the kernels."""
    notes: Counter[str] = field(default_factory=Counter)
    """What a user should know of how the call ran; shown in the report."""

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def lse(self) -> torch.Tensor:
        """float32 [B, H, S]: the log-sum-exp of dense attention. A pass over all of q·k, so it is for calibration."""
        return self.once("lse", lambda: self.lse_of(self.q))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, which is costly and the same for all patterns that look at these very q and k: made once."""
        q, k, made = self.shared.get(key, (None, None, None))
        if q is not self.q or k is not self.k:
            made = make()
            self.shared[key] = (self.q, self.k, made)
        return made

    def lse_of(self, q: torch.Tensor) -> torch.Tensor:
        """float32 [B, H, n]: likewise of some queries [B, H, n, D], over all keys that are no padding."""
        q_len, k_len = q.shape[2], self.k.shape[2]
        mask = torch.ones(1, 1, -(-q_len // LSE_BLOCK), 1, dtype=torch.bool, device=self.device)
        layout = BlockLayout.from_mask(
            mask, LSE_BLOCK, k_len, q_len, k_len, pairs=mask.numel(), key_lengths=self.key_lengths
        )
        return block_sparse_attention(q, self.k, self.v, layout, self.scale, return_lse=True, backend=self.backend)[1]

    @cached_property
    def video_q(self) -> torch.Tensor:
        """[B, H, N, D]: the queries of the video's tokens, in the order of the grid."""
        return self._video(self.q, self.segments)

    @cached_property
    def video_k(self) -> torch.Tensor:
        return self._video(self.k, without_padding(self.segments))

    @cached_property
    def video_v(self) -> torch.Tensor:
        return self._video(self.v, without_padding(self.segments))

    def means_of_q(self, blocks: Blocks) -> torch.Tensor:
        """float32 or wider [B, H, n, D]: the mean query of every block. Hoisted tokens need not be put back for it."""
        return self._means(self.q, self.segments, blocks)

    def means_of_k(self, blocks: Blocks) -> torch.Tensor:
        return self._means(self.k, without_padding(self.segments), blocks)

    def _means(self, x: torch.Tensor, segments: tuple[Segment, ...], blocks: Blocks) -> torch.Tensor:
        if not self.hoist or blocks.name != self.hoist:
            return block_means(self._video(x, segments), blocks)
        if blocks.order is not blocks_in(self.hoist, self.grid, self.block, x.device).order:
            return block_means(self._video(x, segments), blocks)
        video = video_of(segments)
        x = x[:, :, video.start : video.stop].to(torch.promote_types(x.dtype, torch.float32))
        return pool_blocks(x, blocks.bounds)[0]

    @cached_property
    def video_lse(self) -> torch.Tensor:
        """`lse` [B, H, N] of the video's queries, over all keys."""
        return self._video(self.lse[..., None], self.segments)[..., 0]

    def _video(self, x: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor:
        video = video_of(segments)
        x = x if video.length == x.shape[2] else x[:, :, video.start : video.stop]
        return x.index_select(2, places_in(self.hoist, self.grid, self.block, x.device)) if self.hoist else x


@lru_cache(maxsize=4096)
def index_of(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [heads] on the device. A list as an index would be copied there, and waited for, at every use."""
    return torch.tensor(heads).to(device)


def video_of(segments: tuple[Segment, ...]) -> Segment:
    """The one segment that is the video."""
    return next(segment for segment in segments if segment.kind == "video")


def without_padding(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The segments of the keys: padding is taken out, and what lies behind it moves up."""
    kept: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: segment.start):
        if segment.kind != "pad":
            kept.append(replace(segment, start=kept[-1].stop if kept else 0))
    return tuple(kept)


@dataclass(frozen=True, eq=False)
class Selection:
    """The pairs of video blocks that a pattern keeps. Pairs with other segments are no business of a pattern."""

    queries: Blocks
    keys: Blocks
    mask: torch.Tensor
    """bool [B|1, H|1, query blocks, key blocks]."""
    pairs: int
    """At least the pairs that `mask` keeps, known without asking the device."""
    tail: bool = True
    """Whether a tail may stand in for what is dropped. Heads that a pattern skips have none."""
    means: Callable[[Call], Means] | None = None
    """A tail of the pattern's own in place of the block means; its `pairs` are for these query blocks."""


@dataclass(frozen=True)
class Pattern:
    """A rule for which key blocks a query block sees. Frozen, so that equal ones share what is cached.

    Fields are parameters: numbers, words or truth values. Those in `SIZES` follow from a wished density, the others
    are options that a plan may set.
    """

    SIZES: ClassVar[tuple[str, ...]] = ("density",)
    STATIC: ClassVar[bool] = False
    """`select` looks at nothing but grid, segments, block and device: its result is cached."""
    HIDDEN_STATES: ClassVar[bool] = False
    """`call.hidden_states` is needed."""
    ADDS: ClassVar[bool] = False
    """`finish` adds a part of its own to the output: tokens must lie as in the grid, and what a dense step lost is not
    what `tails.py` would add."""
    TAIL: ClassVar[str] = "pooled"
    """The tail in a plan that does not say which."""

    @classmethod
    def at_density(
        cls, density: float, grid: Grid, segments: tuple[Segment, ...] = (), block: int = 128, **options: Any
    ) -> Self:
        """The parameters that keep `density` of the video × video pairs, within 0.03 or one block per row.

        Raises:
            ValueError: an option that this pattern has not, or a value that is not allowed.
        """
        cls.check_options(options)
        return cls(density=density, **options)  # type: ignore[call-arg]

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Every option and its default."""
        return {each.name: each.default for each in fields(cls) if each.name not in cls.SIZES}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises ValueError for options that this pattern has not or that are of another type."""
        known = cls.options()
        for name, value in options.items():
            if name not in known:
                allowed = ", ".join(known) or "none"
                raise ValueError(f"{cls.name()} has no option {name!r}; its options are {allowed}")
            if type(value) is not type(known[name]) and not (type(known[name]) is float and type(value) is int):
                raise ValueError(f"{cls.name()}'s option {name} is {value!r}; it must be {_kind_of(known[name])}")

    @classmethod
    def check_values(cls, options: Mapping[str, Any]) -> None:
        """Raises ValueError for options that this pattern has not, or values that it does not allow."""
        cls.check_options(options)
        cls(**dict.fromkeys(cls.SIZES, 1.0), **options)  # type: ignore[arg-type]

    @classmethod
    def options_from(cls, texts: Sequence[str]) -> dict[str, Any]:
        """Options from words like `order=gilbert`, of the type that their defaults have.

        Raises:
            ValueError: an option that this pattern has not, or a value of another kind.
        """
        known, options = cls.options(), {}
        for text in texts:
            name, _, value = text.partition("=")
            cls.check_options({name: known.get(name)})
            kind = type(known[name])
            try:
                options[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"{cls.name()}'s option {name} is {value!r}; it must be {_kind_of(known[name])}"
                ) from error
        return options

    @classmethod
    def name(cls) -> str:
        """The pattern's name in plans: that of its file."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def at_step(self, step: int, grid: Grid) -> Self:
        """The pattern in one denoising step, for those that change over the steps but look at no q or k."""
        return self

    def prepare(self, call: Call, out: torch.Tensor) -> None:
        """Learn from the last dense step: what is needed later goes into `call.memory`. out is [B, H, S, D]."""

    def select(self, call: Call) -> Selection:
        """Choose the pairs on the device, without waiting for it."""
        raise NotImplementedError

    def finish(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        """Last word on the output [B, H, S, D] of these heads."""
        return out


def _kind_of(default: Any) -> str:
    """What values of an option are like, in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    return f"{words[type(default)]}; the default is {default!r}"


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raises ValueError unless least ≤ value ≤ most."""
    if not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; allowed is {least:g} to {most:g}")
