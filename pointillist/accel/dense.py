"""Which dense attention serves the calls that a plan leaves dense: the pipeline's own, a named one, or the fastest."""

import statistics
from functools import partial

import torch

from pointillist.accel import bridge
from pointillist.kernels.bench import interleaved

FASTEST_OF = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "xformers")
"""Diffusers' exact implementations that need no download; approximate ones (sage) serve when they are named."""
ROUNDS = 3


def check_dense(wish: str, device: torch.device) -> None:
    """Raises ValueError unless `wish` is `auto`, `fastest` or a backend of Diffusers that runs on `device`."""
    if wish not in ("auto", "fastest"):
        bridge.check_dense_backend(wish, device)


class DenseAttention:
    """Dense attention of q, k, v [B, S, H, D] for all sites of a pipeline, and what was chosen and why."""

    def __init__(self, wish: str) -> None:
        self._wish = wish
        self.choice = (wish, "asked for")
        if wish == "auto":
            self.choice = ("diffusers", "what the pipeline asks for")

    def handler(self, attention: torch.nn.Module) -> bridge.SiteHandler:
        """What computes the dense calls of `attention`."""
        if self._wish == "auto":
            return bridge.original_attention(attention)
        if self._wish == "fastest":
            return self._by_the_fastest
        return bridge.dense_attention(self._wish)

    def _by_the_fastest(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: bridge.Mask
    ) -> torch.Tensor:
        if mask is not None:  # which few of them take
            return bridge.torch_attention(q, k, v, scale, mask)
        shape = (q.device, q.dtype, *q.shape, k.shape[1])
        if shape not in _measured:
            _measured[shape] = _measure(q, k, v, scale)
        self.choice = _measured[shape]
        return bridge.dense_attention(self.choice[0])(q, k, v, scale, None)


_measured: dict[tuple, tuple[str, str]] = {}
"""(device, dtype, shape) → the fastest, and the figures: facts of this machine, the same for every pipeline."""


def _measure(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[str, str]:
    work = {
        name: partial(bridge.dense_attention(name), q, k, v, scale, None)
        for name in FASTEST_OF
        if _runs(name, q.device)
    }
    seconds, _ = interleaved(work, ROUNDS, q.device)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    in_order = sorted(medians, key=lambda name: medians[name])
    listed = ", ".join(f"{name} {medians[name] * 1e3:.1f} ms" for name in in_order)
    return in_order[0], f"the fastest here for {q.shape[1]} tokens: {listed}"


def _runs(name: str, device: torch.device) -> bool:
    try:
        bridge.check_dense_backend(name, device)
    except ValueError:
        return False
    return True
