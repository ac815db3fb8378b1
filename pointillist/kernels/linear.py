"""Linear attention over block pairs by states: one for each key block, summed for each query block.

With most pairs seen, as in a tail, the sum over what is *not* seen is smaller; but a difference of two large sums
loses digits, so the product with the pairs is always the direct one. It is a matrix product in float32.
"""

from collections.abc import Callable

import torch

from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import has_kernels, in_order, restore_order, valid_places


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: Callable[[torch.Tensor], torch.Tensor],
    layout: BlockLayout,
    pairs: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """See `reference.linear_attention`."""
    k, v = in_order(k, layout.key_order), in_order(v, layout.key_order)
    valid = valid_places(layout.k_len, layout.key_lengths, layout.key_order, k.device)
    states_of, apply = _passes(q, backend)
    wide = torch.promote_types(q.dtype, torch.float32)

    def features_of(x: torch.Tensor) -> torch.Tensor:
        return feature_map(x.to(wide)).to(q.dtype)

    states, norms = states_of(features_of(k), v, layout.key_bounds, valid)
    seen = pairs.to(states.dtype)
    states = (seen @ states.flatten(3)).unflatten(3, states.shape[3:])
    out = apply(features_of(in_order(q, layout.query_order)), states, seen @ norms, layout.query_bounds, v.dtype)
    return restore_order(out, layout.query_order)


def _passes(q: torch.Tensor, backend: str) -> tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], Callable]:
    if has_kernels(q) or backend == "triton":
        from pointillist.kernels.triton import linear

        return linear.states_of, linear.apply
    return _states_of, _apply


@torch.library.custom_op("pointillist::block_states_cpu", mutates_args=())
def _states_of(
    k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [B, H, n, F, D] and norms [B, H, n, F] of features k [B, H, S, F] and values v [B, H, S, D]."""
    wide = torch.promote_types(v.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)
    if valid is not None:
        k, v = (x.masked_fill(~valid[..., None], 0) for x in (k, v))
    batch, heads, _, features = k.shape
    blocks = bounds.shape[-1] - 1
    states = k.new_zeros(batch, heads, blocks, features, v.shape[-1])
    norms = k.new_zeros(batch, heads, blocks, features)
    for (b, h, block), start, stop in _ranges(bounds, batch, heads):
        states[b, h, block] = k[b, h, start:stop].mT @ v[b, h, start:stop]
        norms[b, h, block] = k[b, h, start:stop].sum(0)
    return states, norms


@_states_of.register_fake
def _(k, v, bounds, valid):
    shape = (*k.shape[:2], bounds.shape[-1] - 1, k.shape[3])
    dtype = torch.promote_types(v.dtype, torch.float32)
    return v.new_empty(*shape, v.shape[3], dtype=dtype), v.new_empty(shape, dtype=dtype)


@torch.library.custom_op("pointillist::apply_states_cpu", mutates_args=())
def _apply(
    q: torch.Tensor, states: torch.Tensor, norms: torch.Tensor, bounds: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """φ(q)·state / φ(q)·norm for every query block's own state; 0 where the norm is 0."""
    batch, heads, q_len, _ = q.shape
    q = q.to(states.dtype)
    out = torch.zeros(batch, heads, q_len, states.shape[-1], dtype=dtype)
    for (b, h, block), start, stop in _ranges(bounds, batch, heads):
        total = q[b, h, start:stop] @ norms[b, h, block, :, None]
        average = q[b, h, start:stop] @ states[b, h, block] / total.masked_fill(total == 0, 1)
        out[b, h, start:stop] = average.masked_fill(total == 0, 0).to(dtype)
    return out


@_apply.register_fake
def _(q, states, norms, bounds, dtype):
    return q.new_empty(*q.shape[:3], states.shape[-1], dtype=dtype)


def _ranges(bounds: torch.Tensor, batch: int, heads: int) -> list[tuple[tuple[int, int, int], int, int]]:
    listed = bounds.expand(batch, heads, -1).tolist()
    return [
        ((b, h, i), listed[b][h][i], listed[b][h][i + 1])
        for b in range(batch)
        for h in range(heads)
        for i in range(bounds.shape[-1] - 1)
    ]
