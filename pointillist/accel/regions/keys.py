"""Keys and values of all tokens of a site, kept from step to step; rows computed anew are written over them."""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.memory import owned

FP8 = torch.float8_e4m3fn


def keep(memory: dict[Any, Any], k: torch.Tensor, v: torch.Tensor, how: str) -> None:
    """Those of a step that computes all tokens, [B, S, H, D]. `how`: `full`; `fp8`, with a scale for every head;
    `input`: not they are kept but what they are made of (`Recomputing`); or `none`."""
    if how in ("input", "none"):
        if how == "none":
            memory.pop("laid", None)  # pairs of keys that are not there
        return
    for name, x in (("k", k), ("v", v)):
        if how == "fp8":
            scale = x.abs().amax((1, 3), keepdim=True).float().clamp(min=1e-12) / torch.finfo(FP8).max
            memory[name], memory[name, "scale"] = _rounded(x, scale), scale
        else:
            memory[name] = owned(x)


def renewed(
    memory: dict[Any, Any], rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values [B, S, H, D], with the `rows` int64 [B, n] of them that k and v [B, n, H, D] are; these alone
    where none are kept."""
    if "k" not in memory:
        return k, v
    found = []
    for name, x in (("k", k), ("v", v)):
        index = rows[:, :, None, None].expand(-1, -1, *x.shape[2:])
        scale = memory.get((name, "scale"))
        if scale is None:
            found.append(memory[name].scatter_(1, index, x))
        else:
            bits = memory[name].view(torch.uint8).scatter_(1, index, _rounded(x, scale).view(torch.uint8))
            found.append((bits.view(FP8).float() * scale).to(x.dtype).scatter_(1, index, x))
    return found[0], found[1]


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
        memory = runtime.memory(self._place, runtime.state.grid)
        if runtime.keeps_keys:
            memory["input"], memory["arguments"] = owned(hidden), (args, kwargs)
            return original(hidden, *args, **kwargs)
        index = runtime.rows[..., None].expand(-1, -1, hidden.shape[-1])
        whole = memory["input"].scatter_(1, index, hidden)
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


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(FP8).max
    return (x.float() / scale).clamp(-limit, limit).to(FP8)
