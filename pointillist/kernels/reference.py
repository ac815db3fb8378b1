"""What the kernels compute, in plain torch. Every fast one is tested against this file.

Shapes: q [B, H, Sq, D], k and v [B, H, Sk, D]; `lse` is float32 (float64 for float64 inputs) [B, H, Sq],
natural logarithm. A row that sees nothing gives output 0 and lse −inf.
"""

import torch

from pointillist.kernels.layout import BlockLayout

SCORES_AT_ONCE = 2**25
"""Of pooled attention: so many scores are in memory at a time, 128 MiB of them."""


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logit_bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with `logit_bias` (−inf forbids) added to the scaled scores; all of it in ≥ float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(-1, -2)) * scale + logit_bias
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(wide).min)[..., None])
    return torch.matmul(weights, v.to(wide)).to(v.dtype), lse


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the kept pairs of `layout`."""
    kept = layout.token_mask(q.shape[0], q.shape[1])
    wide = torch.promote_types(q.dtype, torch.float32)
    bias = torch.zeros(kept.shape, dtype=wide, device=q.device).masked_fill_(~kept, float("-inf"))
    if layout.key_lengths is not None:  # a forbidden value may be NaN, and 0 · NaN is not 0
        valid = torch.arange(k.shape[2], device=k.device) < layout.key_lengths[:, None]
        k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v))
    return masked_attention(q, k, v, bias, scale)


def pooled_attention(
    q: torch.Tensor,
    pooled_k: torch.Tensor,
    pooled_v: torch.Tensor,
    log_counts: torch.Tensor,
    pairs: torch.Tensor,
    query_bounds: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over block means. `pairs` bool [B|1, H|1, nq, n], `log_counts` [B|1, H|1, n] added to the logits.

    Each pooled key stands for as many tokens as its count (Sol-Attn; SVG-EAR): e^(ln n + s) = n·e^s.
    """
    batch, heads, q_len, _ = q.shape
    blocks = torch.arange(pairs.shape[2], device=q.device)
    block_of_row = blocks.repeat_interleave(query_bounds.diff().long(), output_size=q_len)
    bias = log_counts[:, :, None, :].to(torch.promote_types(q.dtype, torch.float32))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=bias.dtype)
    at_once = max(1, SCORES_AT_ONCE // (batch * heads * bias.shape[-1]))
    for rows in (slice(start, start + at_once) for start in range(0, q_len, at_once)):
        rows_bias = torch.where(pairs[:, :, block_of_row[rows]], bias, float("-inf"))
        out[:, :, rows], lse[:, :, rows] = masked_attention(q[:, :, rows], pooled_k, pooled_v, rows_bias, scale)
    return out, lse


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of two disjoint sets of keys; either may be empty for a row."""
    lse = torch.logaddexp(lse_a, lse_b)
    floor = torch.finfo(lse.dtype).min
    share_b = torch.exp(lse_b - lse.clamp(min=floor))[..., None].to(out_a.dtype)
    share_a = torch.exp(lse_a - lse.clamp(min=floor))[..., None].to(out_a.dtype)
    return out_a * share_a + out_b * share_b, lse
