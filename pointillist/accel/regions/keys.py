"""Keys and values of all tokens of a site, kept from step to step; those of rows computed anew stand beside them.

Where two steps are kept, a straight line through them stands in for what was not computed, as in the step cache.
"""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.memory import owned

FP8 = torch.float8_e4m3fn

Kept = tuple[float, torch.Tensor, torch.Tensor | None]
"""At which sigma, what, and the scale of every head where it is in 8 bits."""


def keep(memory: dict[Any, Any], k: torch.Tensor, v: torch.Tensor, how: str, at: float, steps: int) -> None:
    """Those of a step that computes all tokens, [B, S, H, D], beside those of earlier ones, of so many `steps`.

    Args:
        how: `full`; `fp8`, with a scale for every head; `input`: not they are kept but what they are made of
            (`Recomputing`); or `none`.
        at: the step's sigma.
    """
    if how in ("input", "none"):
        if how == "none":
            memory.pop("laid", None)  # pairs of keys that are not there
        return
    for name, x in (("k", k), ("v", v)):
        _append(memory, name, (at, *(_in_8_bits(x) if how == "fp8" else (owned(x), None))), steps)


def renewed(
    memory: dict[Any, Any], rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: float, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values [B, S, H, D], with the `rows` int64 [B, n] of them that k and v [B, n, H, D] are; these alone
    where none are kept."""
    if "k" not in memory:
        return k, v
    every_k, every_v = (_renewed(memory[name], rows, x, at, steps) for name, x in (("k", k), ("v", v)))
    return every_k, every_v


def length(memory: dict[Any, Any]) -> int:
    """Of how many tokens keys are kept, those of text beside the video among them."""
    return memory["k"][-1][1].shape[1]


class Recomputing:
    """Keys and values of one attention module, made anew in every region step of what went into it."""

    def __init__(self, runtime: Any, place: str) -> None:
        """`place`: the site's memory, as `Site` names it."""
        self._runtime, self._place = runtime, place

    def around(self, original: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the module's forward pass; hidden states [B, S, C] are its first argument."""
        runtime = self._runtime
        if not runtime.keeps_keys and runtime.rows is None:
            return original(hidden, *args, **kwargs)
        memory, at, steps = runtime.memory(self._place, runtime.state.grid), runtime.state.sigma, runtime.kept_steps
        if runtime.keeps_keys:
            _append(memory, "input", (at, owned(hidden), None), steps)
            memory["arguments"] = args, kwargs
            return original(hidden, *args, **kwargs)
        whole = _renewed(memory["input"], runtime.rows, hidden, at, steps)
        all_args, all_kwargs = memory["arguments"]
        runtime.only_keys = True
        try:
            original(whole, *all_args, **all_kwargs)
        finally:
            runtime.only_keys = False
        try:
            return original(hidden, *args, **kwargs)
        finally:
            memory.pop("k"), memory.pop("v")


def _append(memory: dict[Any, Any], name: str, kept: Kept, steps: int) -> None:
    history = memory.setdefault(name, [])
    if history and history[-1][0] == kept[0]:  # the same step once more
        history.pop()
    history.append(kept)
    del history[:-steps]


def _renewed(history: list[Kept], rows: torch.Tensor, x: torch.Tensor, at: float, steps: int) -> torch.Tensor:
    """[B, S, …]: of one step that is kept, with x [B, n, …] written over it for later steps too; of two, the line."""
    index = rows.view(*rows.shape, *(1 for _ in x.shape[2:])).expand(-1, -1, *x.shape[2:])
    if steps > 1:
        return _line(history, at).to(x.dtype).scatter_(1, index, x)
    _, last, scale = history[-1]
    if scale is None:
        return last.scatter_(1, index, x)
    last.view(torch.uint8).scatter_(1, index, _rounded(x, scale).view(torch.uint8))
    return (last.float() * scale).to(x.dtype).scatter_(1, index, x)


def _line(history: list[Kept], at: float) -> torch.Tensor:
    """The line through what is kept, but no further on than the two lie apart; a new tensor."""
    (_, before), (position, last) = ((each[0], _whole(each)) for each in (history[0], history[-1]))
    if len(history) < 2:
        return last.clone()
    slope = min(1.0, (at - position) / (position - history[0][0]))
    return torch.lerp(before, last, 1 + slope)


def _whole(kept: Kept) -> torch.Tensor:
    _, x, scale = kept
    return x if scale is None else x.float() * scale


def _in_8_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax((1, 3), keepdim=True).float().clamp(min=1e-12) / torch.finfo(FP8).max
    return _rounded(x, scale), scale


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(FP8).max
    return (x.float() / scale).clamp(-limit, limit).to(FP8)
