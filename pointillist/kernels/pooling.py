"""Block means: what selection scores and what a pooled tail attends to."""

import torch

from pointillist.kernels.layout import BlockLayout


def pool_blocks(
    x: torch.Tensor,
    bounds: torch.Tensor,
    lengths: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the valid tokens of every block.

    Args:
        x: [B, H, S, D], in the order of `bounds`.
        bounds: int32 [n+1].
        lengths: int64 [B], valid tokens per batch entry (counted in the tokens' own order), or None.
        order: [B|1, H|1, S], the token at each place, needed only to know which places are valid.

    Returns:
        means [B, H, n, D] of `x`'s dtype (0 for a block without valid tokens) and counts [B|1, H|1, n], float32.
    """
    sizes = bounds.diff().long()
    wide = torch.promote_types(x.dtype, torch.float32)
    if lengths is None:
        counts = sizes.float()[None, None]
    else:
        tokens = torch.arange(x.shape[2], device=x.device)[None, None] if order is None else order
        valid = tokens < lengths[:, None, None]
        x = x.masked_fill(~valid[..., None], 0)
        counts = _block_sums(valid[..., None].float(), sizes)[..., 0]
    return (_block_sums(x.to(wide), sizes) / counts.clamp(min=1)[..., None]).to(x.dtype), counts


def _block_sums(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    block_of = torch.repeat_interleave(torch.arange(sizes.numel(), device=x.device), sizes, output_size=x.shape[2])
    sums = torch.zeros(*x.shape[:2], sizes.numel(), x.shape[3], dtype=x.dtype, device=x.device)
    return sums.index_add_(2, block_of, x)


def in_order(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """`x` [B, H, S, D] taken in `order` [B|1, H|1, S]; None is the tokens' own order."""
    if order is None:
        return x
    if order.shape[:2] == (1, 1):
        return x.index_select(2, order[0, 0])
    return x.gather(2, order.expand(*x.shape[:2], -1)[..., None].expand_as(x))


def dropped_of(layout: BlockLayout) -> torch.Tensor:
    """The pairs that a tail may stand in for: neither kept nor forbidden. bool [B|1, H|1, nq, nk]."""
    dropped = ~layout.mask()
    if layout.key_lengths is None:
        return dropped
    probe = torch.zeros(layout.key_lengths.numel(), 1, layout.k_len, 1, device=layout.device)
    counts = pool_blocks(probe, layout.key_bounds, layout.key_lengths, layout.key_order)[1]
    return dropped & (counts > 0)[:, :, None]
