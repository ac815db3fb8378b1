"""Any other transformer of Diffusers: its attention stays as it is, its steps can be cached."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.models import fingerprints
from pointillist.accel.tiles import Grid

PRESET = None


def is_member(transformer: Any) -> bool:
    """Whether it is a model of Diffusers that is called with latents and a timestep."""
    named = inspect.signature(transformer.forward).parameters
    return hasattr(transformer, "config") and {"hidden_states", "timestep"} <= set(named)


def sites(transformer: Any) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """None: where its attention is, nobody has said."""
    return []


def modules(transformer: Any) -> list[dict[str, list[torch.nn.Module]]]:
    """Of every layer, its self-attention and its feed-forward networks. Raises ValueError where they are not apart."""
    from pointillist.accel import bridge  # which imports Diffusers, and plans are read without it

    return bridge.attention_and_mlp(transformer)


def heads(transformer: Any) -> int:
    return 0


def inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, None]:
    """`hidden_states` from the arguments of a forward call. Timesteps have many units: steps are counted instead."""
    return (args[0] if args else kwargs["hidden_states"]), None


def grid(transformer: Any, hidden_states: torch.Tensor) -> Grid:
    """How the tokens lie is not known: their number, if they are in a row."""
    return 1, 1, hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states[0, 0].numel()


def watch_modulation(transformer: Any, tell: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """What modulates its blocks is not known either."""
    return lambda: None


def fingerprint(transformer: Any) -> str:
    """Names the class and the configuration."""
    return f"{type(transformer).__name__}-{fingerprints.digest(transformer)}"
