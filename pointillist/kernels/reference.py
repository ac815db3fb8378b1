"""What the kernels compute, in plain torch. Every fast one is tested against this file.

Shapes: q [B, H, Sq, D], k and v [B, H, Sk, D], all in the tokens' own order; `lse` is float32 (float64 for float64
inputs) [B, H, Sq], natural logarithm. A row that sees nothing gives output 0 and lse −inf.
"""

from collections.abc import Callable

import torch

from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import Means, in_order, restore_order, valid_places

SCORES_AT_ONCE = 2**25
"""So many scores are in memory at a time, 128 MiB of them."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float,
    means: Means | None = None,
    query_blocks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the kept pairs of `layout` and, if given, the `means` of others: one softmax over both.

    `query_blocks` int64 [n] names the query blocks to compute; None is all. The rest give 0 and −inf.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, q_len, _ = q.shape
    kept = layout.token_mask(batch, heads)
    block_of = restore_order(layout.query_block_of_place(batch, heads)[..., None], layout.query_order)[..., 0]
    if layout.key_lengths is not None:  # a forbidden value may be NaN, and 0 · NaN is not 0
        valid = torch.arange(k.shape[2], device=k.device) < layout.key_lengths[:, None]
        k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v))
    k, v = k.to(wide), v.to(wide)
    pairs = None
    if means is not None:
        k, v = (torch.cat([x, y.to(wide)], dim=2) for x, y in ((k, means.keys), (v, means.values)))
        bias = means.log_counts.to(wide).expand(batch, heads, -1)[:, :, None]
        pairs = means.pairs.expand(batch, heads, -1, -1)
    out, lse = q.new_empty(q.shape[:3] + v.shape[3:], dtype=wide), q.new_empty(q.shape[:3], dtype=wide)
    step = max(1, SCORES_AT_ONCE // (batch * heads * k.shape[2]))
    for rows in (slice(start, start + step) for start in range(0, q_len, step)):
        allowed = kept[:, :, rows]
        logits = torch.matmul(q[:, :, rows].to(wide), k.transpose(-1, -2)) * scale
        if pairs is not None:
            seen = pairs.gather(2, block_of[:, :, rows, None].expand(-1, -1, -1, pairs.shape[3]))
            allowed = torch.cat([allowed, seen], dim=-1)
            logits[..., kept.shape[3] :] += bias
        if query_blocks is not None:
            allowed = allowed & torch.isin(block_of[:, :, rows], query_blocks)[..., None]
        out[:, :, rows], lse[:, :, rows] = _softmax_average(logits.masked_fill_(~allowed, float("-inf")), v)
    return out.to(q.dtype), lse


def _softmax_average(logits: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
    return torch.matmul(weights, v), lse


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of two disjoint sets of keys; either may be empty for a row."""
    shapes = {tuple(out_a.shape[:-1]), tuple(out_b.shape[:-1]), tuple(lse_a.shape), tuple(lse_b.shape)}
    if len(shapes) > 1 or out_a.shape != out_b.shape or out_a.dtype != out_b.dtype or not out_a.is_floating_point():
        raise ValueError(
            f"outputs {out_a.dtype} {tuple(out_a.shape)} and {out_b.dtype} {tuple(out_b.shape)} with lse "
            f"{tuple(lse_a.shape)} and {tuple(lse_b.shape)} must be [B, H, S, D] twice, in one floating dtype, and "
            "[B, H, S] twice"
        )
    lse = torch.logaddexp(lse_a, lse_b)
    floor = torch.finfo(lse.dtype).min
    share_b = torch.exp(lse_b - lse.clamp(min=floor))[..., None]
    share_a = torch.exp(lse_a - lse.clamp(min=floor))[..., None]
    return (out_a * share_a + out_b * share_b).to(out_a.dtype), lse


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: Callable[[torch.Tensor], torch.Tensor],
    layout: BlockLayout,
    pairs: torch.Tensor,
) -> torch.Tensor:
    """Σ φ(q)·φ(k) v / Σ φ(q)·φ(k) over the tokens of the block `pairs` (bool [B|1, H|1, nq, nk]), not forbidden."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads = q.shape[:2]
    q, k, v = in_order(q, layout.query_order), in_order(k, layout.key_order), in_order(v, layout.key_order)
    valid = valid_places(layout.k_len, layout.key_lengths, layout.key_order, k.device)
    if valid is not None:
        k, v = (x.masked_fill(~valid[..., None], 0) for x in (k, v))
    weights = feature_map(q.to(wide)) @ feature_map(k.to(wide)).transpose(-1, -2)
    rows, columns = layout.query_block_of_place(batch, heads), layout.key_block_of_place(batch, heads)
    seen = pairs.expand(batch, heads, -1, -1).gather(2, rows[..., None].expand(-1, -1, -1, pairs.shape[3]))
    seen = seen.gather(3, columns[:, :, None].expand(-1, -1, rows.shape[2], -1))
    if valid is not None:
        seen = seen & valid[:, :, None]
    weights = weights.masked_fill(~seen, 0)
    total = weights.sum(-1, keepdim=True)
    out = torch.where(total == 0, 0, weights @ v.to(wide) / torch.where(total == 0, 1, total)).to(v.dtype)
    return restore_order(out, layout.query_order)


def block_masses(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, layout: BlockLayout, scale: float
) -> torch.Tensor:
    """How much softmax weight the queries of a block give to each key block on average: float32 [B, H, nq, nk].

    `lse` [B, H, Sq] is that of dense attention; then the masses of a row sum to 1. Forbidden keys have none. The
    bounds and orders of `layout` count, its kept pairs do not (AdaSpa, the online search).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads = q.shape[:2]
    rows = layout.query_block_of_place(batch, heads)
    sizes = layout.key_bounds.diff().long().expand(batch, heads, -1)[:, :, None]
    q, k = in_order(q, layout.query_order), in_order(k, layout.key_order).to(wide)
    lse = in_order(lse[..., None], layout.query_order)
    valid = valid_places(layout.k_len, layout.key_lengths, layout.key_order, k.device)
    masses = q.new_zeros(batch, heads, layout.query_blocks, layout.key_blocks, dtype=wide)
    step = max(1, SCORES_AT_ONCE // (batch * heads * layout.k_len))
    for part in (slice(start, start + step) for start in range(0, layout.q_len, step)):
        weights = ((q[:, :, part].to(wide) * scale) @ k.mT).sub_(lse[:, :, part]).exp_()
        if valid is not None:
            weights = weights.masked_fill(~valid[:, :, None], 0)
        lengths = sizes.expand(-1, -1, weights.shape[2], -1).contiguous()
        by_column = torch.segment_reduce(weights, "sum", lengths=lengths, axis=3, unsafe=True)
        masses.scatter_add_(2, rows[:, :, part, None].expand_as(by_column), by_column)
    return masses / layout.query_bounds.diff().clamp(min=1)[..., None]
