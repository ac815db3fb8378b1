"""Taking a part of the tokens through a transformer, by hooks on the modules at its ends (RAS, arXiv 2502.10389)."""

from collections.abc import Callable
from typing import Any

import torch

Rows = Callable[[], torch.Tensor | None]
"""Gives, in the running call, int64 [B, n] the tokens to compute, or None for all."""


def gathered(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of x [B, N, C]: [B, n, C]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


def take(
    entry: torch.nn.Module,
    leaving: torch.nn.Module,
    rows: Rows,
    full: Callable[[torch.Tensor], torch.Tensor],
    others: dict[torch.nn.Module, Callable[[Any, torch.Tensor], Any]],
    entering: Callable[[Any, torch.Tensor], Any] = gathered,
) -> Callable[[], None]:
    """Let only the rows go from one module to another. Returns the undo.

    Args:
        entry: gives the tokens [B, N, C].
        leaving: gives the output [B, n, C'].
        full: makes that of all tokens of it.
        others: modules between whose outputs are about all tokens, and how to take the rows of them.
        entering: how to take those of the entry's output.
    """

    def around(part: Callable[[Any, torch.Tensor], Any]) -> Callable[..., Any]:
        @torch.compiler.disable
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            index = rows()
            return None if index is None else part(output, index)

        return hook

    @torch.compiler.disable
    def filled(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return full(output)

    hooks = [entry.register_forward_hook(around(entering)), leaving.register_forward_hook(filled)]
    hooks += [module.register_forward_hook(around(part)) for module, part in others.items()]

    def undo() -> None:
        for each in hooks:
            each.remove()

    return undo
