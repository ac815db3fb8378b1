"""Attention on tensors. Knows torch and triton only: no model, no plan."""

from pointillist.kernels.clustering import Clusters, k_means
from pointillist.kernels.dispatch import (
    BREAK_EVEN,
    attention_with_pooled_tail,
    available_backends,
    block_masses,
    block_sparse_attention,
    choose_backend,
    linear_attention,
    merge_attention,
    pooled_attention,
)
from pointillist.kernels.layout import BlockLayout, uniform_bounds
from pointillist.kernels.pooling import Means, dropped_of, means_of, pool_blocks
from pointillist.kernels.selection import above, top_k, top_p

__all__ = [
    "BREAK_EVEN",
    "BlockLayout",
    "Clusters",
    "Means",
    "above",
    "attention_with_pooled_tail",
    "available_backends",
    "block_masses",
    "block_sparse_attention",
    "choose_backend",
    "dropped_of",
    "k_means",
    "linear_attention",
    "means_of",
    "merge_attention",
    "pool_blocks",
    "pooled_attention",
    "top_k",
    "top_p",
    "uniform_bounds",
]
