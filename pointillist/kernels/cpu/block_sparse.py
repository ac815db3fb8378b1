"""Block-sparse attention on CPUs: compiled for this machine, or by torch's operators where that cannot be."""

import torch

from pointillist.kernels.cpu import compiled, operators
from pointillist.kernels.cpu.build import kernel
from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import Means


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float,
    means: Means | None = None,
    query_blocks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.attention`; lse is float32."""
    library, _ = kernel()
    if library is None or not compiled.serves(q):
        return operators.attention(q, k, v, layout, scale, means, query_blocks)
    return compiled.attention(library, q, k, v, layout, scale, means, query_blocks)


def how() -> str:
    """Which of the two computes, and why if it is the slower one."""
    library, reason = kernel()
    return "compiled for this machine" if library is not None else f"torch operators: {reason}"
