"""Attention on tensors. Knows torch and triton only: no model, no plan."""

from pointillist.kernels.dispatch import (
    attention_with_pooled_tail,
    available_backends,
    block_sparse_attention,
    choose_backend,
    merge_attention,
    pooled_attention,
)
from pointillist.kernels.layout import BlockLayout, uniform_bounds
from pointillist.kernels.pooling import dropped_of, pool_blocks

__all__ = [
    "BlockLayout",
    "attention_with_pooled_tail",
    "available_backends",
    "block_sparse_attention",
    "choose_backend",
    "dropped_of",
    "merge_attention",
    "pool_blocks",
    "pooled_attention",
    "uniform_bounds",
]
