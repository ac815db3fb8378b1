"""The one file that touches private names of Diffusers: how its attention calls reach us.

Diffusers' dispatcher accepts only members of a closed enum, so `pointillist` is added to it as one more. The
backend is set on a site's own processor and never process-wide (`set_attention_backend` also sets a global
default and does not undo it). A backend sees q, k and v but not its layer: a hook on the block copies the
site's number into one shared tensor, and a single opaque operator looks the number up. So `torch.compile`
sees the same graph in every layer; a Python value per layer would recompile it each time.

Processors that do not ask for a backend (SD3, PixArt, CogVideoX, Mochi, Lumina, HiDream, Cosmos) call
`F.scaled_dot_product_attention` or the dispatcher by a name of their module. A site of theirs gets a copy of its
processor whose method reads these two names in a namespace of ours: nothing of theirs is written again, no class is
changed, and `torch.compile` sees a plain method.
"""

import copy
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.hooks._common import (
    _ALL_TRANSFORMER_BLOCK_IDENTIFIERS,
    _ATTENTION_CLASSES,
    _FEEDFORWARD_CLASSES,
)
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)

Mask = torch.Tensor | None
SiteHandler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None, Mask], torch.Tensor]
"""(q [B, S, H, D], k and v [B, Sk, H, D], scale, mask that broadcasts to [B, H, S, Sk]) → [B, S, H, D]."""

_NAME = "pointillist"
_MARK = "_pointillist_routed"
_handlers: dict[int, SiteHandler] = {}
_numbers = itertools.count()
with torch.inference_mode(False):
    _current_site = torch.tensor(-1)


@torch.library.custom_op("pointillist::site_attention", mutates_args=())
def _site_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    site: torch.Tensor,
    scale: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    handler = _handlers.get(int(site))  # `site` lies on the CPU: reading it waits for no device
    if handler is None:
        raise RuntimeError(
            f"attention reached pointillist outside of an accelerated block (site {int(site)}): a processor "
            "was moved to another module; restore() the handle and accelerate the pipeline again"
        )
    return handler(query, key, value, scale, mask).contiguous()


@_site_attention.register_fake
def _(query, key, value, site, scale, mask):
    return query.new_empty(query.shape)


def _backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """Diffusers drops arguments that a backend does not name, so all are named, and refused here if set."""
    refused = {
        "dropout_p": dropout_p != 0,
        "is_causal": is_causal,
        "return_lse": return_lse,
        "parallel_config": _parallel_config is not None,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"{name} was given to accelerated self-attention, which does not support it")
    if enable_gqa and key.shape[2] != query.shape[2]:
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    return _site_attention(query, key, value, _current_site, scale, attn_mask)


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """In place of torch's, for tensors [B, H, S, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return _backend(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa).transpose(1, 2)


def _dispatched(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """In place of Diffusers' dispatcher, where it is called without a backend."""
    return _backend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, False, parallel_config)


@lru_cache(maxsize=64)
def _rerouted(kind: Hashable) -> Any:
    """A subclass of a processor's class: the same method, which finds our attention by the names that it calls.

    Raises:
        ValueError: the method does not call attention by one of these names.
    """
    assert isinstance(kind, type)
    call: Any = kind.__call__  # type: ignore[operator]
    if not isinstance(call, types.FunctionType) or call.__closure__:
        raise ValueError(f"a {kind.__name__} does not call attention in its own method")
    ours = {"F": _functional(), "dispatch_attention_fn": _dispatched}
    names = {name for name in ours if name in call.__code__.co_names}
    if not names or ("F" in names and "scaled_dot_product_attention" not in call.__code__.co_names):
        raise ValueError(f"a {kind.__name__} does not call attention by a name that is known")
    # a module that can be imported by its name: torch.compile looks there for what a function's globals are
    space = types.ModuleType(f"{__name__}.{kind.__module__.replace('.', '_')}_{kind.__name__}")
    vars(space).update({**call.__globals__, "__name__": space.__name__, **{name: ours[name] for name in names}})
    sys.modules[space.__name__] = space
    method = types.FunctionType(call.__code__, vars(space), call.__name__, call.__defaults__)
    method.__kwdefaults__, method.__annotations__ = call.__kwdefaults__, call.__annotations__
    return type(kind.__name__, (kind,), {"__call__": method, _MARK: True, "__module__": kind.__module__})


@lru_cache(maxsize=1)
def _functional() -> types.ModuleType:
    """`torch.nn.functional` with our attention."""
    space = types.ModuleType("functional")
    vars(space).update(vars(torch.nn.functional))
    space.scaled_dot_product_attention = _scaled_dot_product_attention  # type: ignore[attr-defined]
    return space


def _our_backend() -> AttentionBackendName:
    """Our member of Diffusers' enum, registered on first use."""
    members = AttentionBackendName._value2member_map_
    if _NAME not in members:
        member = str.__new__(AttentionBackendName, _NAME)
        member._name_, member._value_ = _NAME.upper(), _NAME
        AttentionBackendName._member_map_[_NAME.upper()] = member
        members[_NAME] = member
        _AttentionBackendRegistry.register(member)(_backend)
    return members[_NAME]  # type: ignore[return-value]


def _announce_site(block: torch.nn.Module, args: tuple[Any, ...]) -> None:
    _current_site.copy_(block._pointillist_site)  # type: ignore[arg-type]


def route(block: torch.nn.Module, attention: Any, handler: SiteHandler) -> Callable[[], None]:
    """Send the attention calls of `attention`, a submodule of `block`, to `handler`. Returns the undo."""
    number = next(_numbers)
    _handlers[number] = handler
    with torch.inference_mode(False):
        block._pointillist_site = torch.tensor(number)
    hook = block.register_forward_pre_hook(_announce_site)
    original = attention.processor
    ours = copy.copy(original)  # the original may be shared with other modules, cross-attention among them
    if uses_dispatcher(attention):
        ours._attention_backend = _our_backend()
    else:
        kind: Any = type(original)
        ours.__class__ = _rerouted(kind)
    attention.processor = ours

    def undo() -> None:
        if attention.processor is ours:
            attention.processor = original
        hook.remove()
        del block._pointillist_site
        del _handlers[number]

    return undo


def original_attention(attention: Any) -> SiteHandler:
    """What `attention` computes now: Diffusers' dispatcher with the backend that its processor asks for, or torch's own
    where it asks for none."""
    names = () if uses_dispatcher(attention) else type(attention.processor).__call__.__code__.co_names
    if "scaled_dot_product_attention" in names:
        return torch_attention
    backend = getattr(attention.processor, "_attention_backend", None)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: Mask) -> torch.Tensor:
        return dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale, backend=backend)

    return attend


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: Mask) -> torch.Tensor:
    """torch's own attention of tensors [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def check_dense_backend(name: str, device: torch.device) -> None:
    """Raises ValueError unless Diffusers has an attention backend `name` that runs on `device`: a tiny call is made."""
    known = [member.value for member in AttentionBackendName if member.value != _NAME]
    if name not in known:
        raise ValueError(f"dense={name!r} is unknown; allowed are auto, fastest, {', '.join(known)}")
    if name.endswith("_hub"):
        raise ValueError(
            f"dense={name!r} is fetched from the Hub when it is set; call transformer.set_attention_backend({name!r}) "
            "yourself and leave dense='auto'"
        )
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
        x = torch.zeros(1, 64, 1, 64, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
        dense_attention(name)(x, x, x, None, None)
    except Exception as error:  # whatever a foreign backend raises, it does not run
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"dense={name!r} cannot run on {device}: {first}") from error


def dense_attention(name: str) -> SiteHandler:
    """Diffusers' dispatcher with the backend `name`."""
    backend = AttentionBackendName(name)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: Mask) -> torch.Tensor:
        return dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale, backend=backend)

    return attend


def is_routed(attention: Any) -> bool:
    """Whether the calls of `attention` come to us now."""
    return getattr(attention.processor, "_attention_backend", None) == _NAME or hasattr(attention.processor, _MARK)


def uses_dispatcher(attention: Any) -> bool:
    """Whether the processor of `attention` asks Diffusers' dispatcher for a backend."""
    return hasattr(attention.processor, "_attention_backend")


def check_route(attention: Any) -> None:
    """Raises ValueError unless calls of `attention` can be sent to us."""
    if not uses_dispatcher(attention):
        kind: Any = type(attention.processor)
        _rerouted(kind)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `module` was given to torch.compile, which would not see hooks added from now on."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def caching_hooks(transformer: torch.nn.Module) -> list[str]:
    """Names of Diffusers' cache hooks found in `transformer`, however they came there."""
    names: set[str] = set()
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        names.update(registry.hooks if registry is not None else ())
    words = ("cache", "fbc_", "pyramid_attention_broadcast", "taylorseer")
    found = {name for name in names if any(word in name for word in words)}
    if not found and getattr(transformer, "is_cache_enabled", False):  # one that has hooked nothing yet
        found.add(type(getattr(transformer, "_cache_config", None)).__name__)
    return sorted(found)


@dataclass(frozen=True)
class Streams:
    """How a block takes and gives hidden states, and those of the text where it changes them."""

    hidden_name: str
    text_name: str
    places: tuple[int | None, int | None]
    """Of both in the output; the second is None where the text is not changed."""
    parameters: tuple[str, ...]
    """Of the block's forward pass, in order."""

    def into(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both, from the arguments of a call; no text where it is not changed."""
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        return named[self.hidden_name], named.get(self.text_name) if self.places[1] is not None else None

    def out_of(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both, from what a block gave."""
        if isinstance(output, torch.Tensor):
            return output, None
        hidden, text = self.places
        return output[hidden or 0], None if text is None else output[text]

    def give(self, hidden: torch.Tensor, text: torch.Tensor | None) -> Any:
        """What a block would give."""
        if self.places[1] is None:
            return hidden
        pair = [hidden, text]
        return tuple(pair if self.places[0] == 0 else reversed(pair))


def streams_of(block: torch.nn.Module) -> Streams:
    """Raises ValueError for a block that Diffusers' registry does not know."""
    kind: Any = type(block)
    return _streams_of(kind)


@lru_cache(maxsize=64)
def _streams_of(kind: Any) -> Streams:
    known = TransformerBlockRegistry.get(kind)
    parameters, hidden = tuple(inspect.signature(kind.forward).parameters)[1:], known.hidden_states_argument_name
    return Streams(
        hidden if hidden in parameters else parameters[0],  # Z-Image's is `x`, which the registry does not say
        known.encoder_hidden_states_argument_name,
        (known.return_hidden_states_index, known.return_encoder_hidden_states_index),
        parameters,
    )


def block_lists(transformer: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """The transformer's lists of blocks by name, in the order of its forward pass; none if one of them is unknown."""
    lists = {
        name: child
        for name, child in transformer.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, torch.nn.ModuleList) and len(child)
    }
    try:
        for blocks in lists.values():
            for block in blocks:
                streams_of(block)
    except ValueError:
        return {}
    return lists


def attention_and_mlp(transformer: torch.nn.Module) -> list[dict[str, list[torch.nn.Module]]]:
    """Of every block, in the order of the forward pass: its self-attention, and its feed-forward networks.

    Of several attentions in a block, the first is the one over its own tokens.

    Raises:
        ValueError: the blocks are not known, or one has no such modules of its own.
    """
    kind = type(transformer).__name__
    layers: list[dict[str, list[torch.nn.Module]]] = []
    for block in (block for blocks in block_lists(transformer).values() for block in blocks):
        children = list(block.children())
        attentions: list[torch.nn.Module] = [each for each in children if isinstance(each, _ATTENTION_CLASSES)]
        mlps: list[torch.nn.Module] = [each for each in children if isinstance(each, _FEEDFORWARD_CLASSES)]
        if not attentions or not mlps:
            raise ValueError(
                f"a {type(block).__name__} of {kind} has attention and feed-forward network fused, so a cache table "
                "cannot tell them apart; cache='easy' reuses whole steps"
            )
        own = [each for each in attentions if not getattr(each, "is_cross_attention", False)] or attentions
        layers.append({"attention": own[:1], "mlp": mlps})
    if not layers:
        raise ValueError(f"the blocks of {kind} are not known to Diffusers; cache='easy' reuses whole steps")
    return layers


@dataclass(frozen=True)
class Form:
    """How a transformer gives what it computed: a tuple or an object of Diffusers, whose first part may be a list with
    a tensor for each entry of the batch (Z-Image), and others may follow (the audio of LTX-2)."""

    kind: type
    names: tuple[str, ...]
    """Of the parts of an object."""
    listed: bool

    @classmethod
    def of(cls, output: Any) -> "Form":
        return cls(type(output), tuple(output) if isinstance(output, dict) else (), isinstance(output[0], list))

    def give(self, parts: list[torch.Tensor]) -> Any:
        """An output of this form with other parts."""
        every: list[Any] = [list(parts[0]) if self.listed else parts[0], *parts[1:]]
        return self.kind(**dict(zip(self.names, every, strict=True))) if self.names else tuple(every)


def parts_of(output: Any) -> list[torch.Tensor]:
    """What a transformer gave: of its latents, as one tensor, and whatever else."""
    first, *others = output.values() if isinstance(output, dict) else output
    return [torch.stack(first) if isinstance(first, list) else first, *others]


def foreign_cache(transformer: torch.nn.Module) -> str:
    """Which other package caches `transformer`, as far as its marks show; "" if none does."""
    marks = {"_is_cached": "cache-dit or ParaAttention", "enable_teacache": "TeaCache"}
    found = (package for mark, package in marks.items() if getattr(transformer, mark, False))
    return next(found, "")
