"""The way into Diffusers' attention, and the one file that touches its private names (Diffusers 0.42).

Diffusers' registry of attention backends is a closed enumeration. A member of our own is added for every accelerated
transformer, set on the processors of its self-attentions only (never as the process-wide default), and taken out again.

The backend must know which site calls it without breaking `torch.compile`: a Python value per layer would compile
every layer anew. So a hook on the *block* copies the site's number, a tensor, into one tensor per transformer, and
the backend hands that tensor to one opaque operator, which looks the site up when it runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]
"""q, k, v [B, S, H, D] and the scale → output [B, S, H, D]."""

_numbers = itertools.count(1)
_sites: dict[int, Attend] = {}


@torch.library.custom_op("pointillist::attend", mutates_args=())
def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: torch.Tensor, scale: float | None) -> torch.Tensor:
    return _sites[int(site)](q, k, v, scale).contiguous()


@_attend.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: torch.Tensor, scale: float | None) -> torch.Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


class Bridge:
    """The installed connection of one transformer: `sites` pairs (block, attention) with the function that computes it."""

    def __init__(self, sites: list[tuple[torch.nn.Module, torch.nn.Module, Attend]]) -> None:
        self._current = torch.zeros((), dtype=torch.int64)
        self._name = f"pointillist_{next(_numbers)}"
        self._member = self._register_backend()
        self._undo: list[Callable[[], Any]] = []
        for block, attention, attend in sites:
            number = next(_numbers)
            _sites[number] = attend
            block._pointillist_site = torch.tensor(number)  # type: ignore[assignment]
            block._pointillist_current = self._current
            hook = block.register_forward_pre_hook(_announce_site)
            processor, before = attention.processor, vars(attention.processor).get("_attention_backend")
            processor._attention_backend = self._member
            self._undo += [
                hook.remove,
                lambda number=number: _sites.pop(number),
                lambda block=block: [vars(block).pop(n) for n in ("_pointillist_site", "_pointillist_current")],
                lambda processor=processor, before=before: _restore(processor, before),
            ]

    def remove(self) -> None:
        """Take everything out again; the processors get back what they had."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        member = self._member
        AttentionBackendName._member_map_.pop(self._name.upper())
        AttentionBackendName._value2member_map_.pop(self._name)
        for table in ("_backends", "_constraints", "_supported_arg_names"):
            getattr(_AttentionBackendRegistry, table).pop(member)

    def _register_backend(self) -> AttentionBackendName:
        member = str.__new__(AttentionBackendName, self._name)
        member._name_, member._value_ = self._name.upper(), self._name
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._value2member_map_[self._name] = member
        current = self._current

        def backend(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
            _parallel_config: Any = None,
        ) -> torch.Tensor:
            if attn_mask is not None or dropout_p or is_causal or enable_gqa or _parallel_config is not None:
                raise ValueError(
                    "pointillist computes self-attention without mask, dropout, causality, grouped queries or context "
                    f"parallelism; given: attn_mask={'a mask' if attn_mask is not None else None}, "
                    f"dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa}, "
                    f"parallel={_parallel_config is not None}"
                )
            return torch.ops.pointillist.attend(query, key, value, current, scale)

        _AttentionBackendRegistry.register(member, constraints=[])(backend)
        return member


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, before: Any
) -> torch.Tensor:
    """What Diffusers would have computed: its own dispatcher with the backend that the processor had `before`."""
    return dispatch_attention_fn(q, k, v, scale=scale, backend=before)


def backend_before(attention: torch.nn.Module) -> Any:
    """The backend that a processor has now, to give to `dense_attention` later."""
    return getattr(attention.processor, "_attention_backend", None)


def is_bridgeable(attention: torch.nn.Module) -> bool:
    """Whether this attention asks Diffusers' dispatcher, so that a backend can be set on its processor."""
    return hasattr(getattr(attention, "processor", None), "_attention_backend")


def _announce_site(block: Any, args: tuple) -> None:
    block._pointillist_current.copy_(block._pointillist_site)


def _restore(processor: Any, before: Any) -> None:
    if before is None:
        vars(processor).pop("_attention_backend", None)
    else:
        processor._attention_backend = before
