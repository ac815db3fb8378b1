"""Wan 2.1 and 2.2: video tokens only in self-attention, text by cross-attention."""

from dataclasses import dataclass
from typing import Any

import torch

from pointillist.accel.tiles import Grid

MINIMUM_TOKENS = 1536
"""Shorter sequences run dense under `plan="auto"`: selection and gathering cost more than they save (docs/kernels.md)."""
PRESET_DENSITY = 0.25
PRESET_DENSE_ABOVE = 0.95


@dataclass(frozen=True)
class Site:
    """One self-attention and the block that it stands in."""

    name: str
    block: torch.nn.Module
    attention: torch.nn.Module


def sites(transformer: Any) -> list[Site]:
    """The self-attentions in the order of the layers."""
    return [Site(f"blocks.{i}.attn1", block, block.attn1) for i, block in enumerate(transformer.blocks)]


def token_grid(transformer: Any, hidden_states: torch.Tensor) -> Grid:
    """(T, H, W) in patches of the latents [B, C, F, H, W] that the transformer is called with."""
    t, h, w = (n // p for n, p in zip(hidden_states.shape[2:], transformer.config.patch_size, strict=True))
    return (t, h, w)


def fingerprint(transformer: Any) -> str:
    """What a plan is made for: the architecture in one line."""
    c = transformer.config
    return f"wan/{c.num_layers}x{c.num_attention_heads}x{c.attention_head_dim}/in{c.in_channels}/ffn{c.ffn_dim}"
