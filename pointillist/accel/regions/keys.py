"""Keys and values of all tokens of a site, kept from step to step; rows computed anew are written over them."""

from typing import Any

import torch

FP8 = torch.float8_e4m3fn


def keep(memory: dict[Any, Any], k: torch.Tensor, v: torch.Tensor, how: str) -> None:
    """Those of a step that computes all tokens, [B, S, H, D]. `how`: `full`, or `fp8` with a scale for every head."""
    for name, x in (("k", k), ("v", v)):
        if how == "fp8":
            scale = x.abs().amax((1, 3), keepdim=True).float().clamp(min=1e-12) / torch.finfo(FP8).max
            memory[name], memory[name, "scale"] = _rounded(x, scale), scale
        else:
            memory[name] = x


def renewed(
    memory: dict[Any, Any], rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values [B, S, H, D], with the `rows` int64 [B, n] of them that k and v [B, n, H, D] are."""
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


def bytes_needed(sites: int, branches: int, batch: int, tokens: int, width: int, size: int, how: str) -> int:
    """Of the keys and values of all sites: `width` channels of `size` bytes."""
    return 2 * sites * branches * batch * tokens * width * (1 if how == "fp8" else size)


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(FP8).max
    return (x.float() / scale).clamp(-limit, limit).to(FP8)
