"""Block means: what selection scores and what a pooled tail attends to."""

from dataclasses import dataclass

import torch

from pointillist.kernels.layout import BlockLayout, block_of_place, bounds_per_head
from pointillist.kernels.triton import INSTALLED


@dataclass(frozen=True)
class Means:
    """Keys that each stand for several tokens, and which query blocks see them.

    A pooled tail, or the levels of a pyramid one after the other (PSA): a mean's logit is raised by the logarithm of
    how many tokens it stands for.
    """

    keys: torch.Tensor
    """[B, H, n, D]; [B, H, n, D] of `values` likewise."""
    values: torch.Tensor
    log_counts: torch.Tensor
    """float32 or wider [B|1, H|1, n]; −inf hides a mean from all."""
    pairs: torch.Tensor
    """bool [B|1, H|1, nq, n]: which query block sees which mean."""


def means_of(k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> Means:
    """The tail of `layout`: the means of its key blocks, seen where the block is dropped. k, v are in place order."""
    keys, counts = pool_blocks(k, layout.key_bounds, layout.key_lengths, layout.key_order)
    values, _ = pool_blocks(v, layout.key_bounds, layout.key_lengths, layout.key_order)
    return Means(keys, values, counts.to(torch.promote_types(k.dtype, torch.float32)).log(), dropped_of(layout))


def pool_blocks(
    x: torch.Tensor,
    bounds: torch.Tensor,
    lengths: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the valid tokens of every block.

    Args:
        x: [B, H, S, D], in the order of `bounds`.
        bounds: int32 [n+1], or [B|1, H|1, n+1].
        lengths: int64 [B], valid tokens per batch entry (counted in the tokens' own order), or None.
        order: [B|1, H|1, S], the token at each place, needed only to know which places are valid.

    Returns:
        means [B, H, n, D] of `x`'s dtype (0 for a block without valid tokens) and counts [B|1, H|1, n], float32.
    """
    bounds = bounds_per_head("bounds", bounds)
    valid = valid_places(x.shape[2], lengths, order, x.device)
    if valid is None:
        counts = bounds.diff().float()
    else:
        counts = _block_sums(valid[..., None].float(), bounds)[..., 0]
    if has_kernels(x):
        from pointillist.kernels.triton.pooling import pool_blocks as on_device

        return on_device(x, bounds, valid), counts
    wide = torch.promote_types(x.dtype, torch.float32)
    if valid is not None:
        x = x.masked_fill(~valid[..., None], 0)
    return (_block_sums(x.to(wide), bounds) / counts.clamp(min=1)[..., None]).to(x.dtype), counts


def has_kernels(x: torch.Tensor) -> bool:
    """Whether Triton's kernels serve `x`; the definitions in plain torch serve everything else."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and INSTALLED


def valid_places(
    length: int, lengths: torch.Tensor | None, order: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """bool [B, H|1, length]: whether each place holds a token that is no padding; None if all do."""
    if lengths is None:
        return None
    tokens = torch.arange(length, device=device)[None, None] if order is None else order
    return tokens < lengths[:, None, None]


def _block_sums(x: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    batch, heads = (max(sizes) for sizes in zip(x.shape[:2], bounds.shape[:2], strict=True))
    block_of = block_of_place(bounds, x.shape[2])
    sums = x.new_zeros(batch, heads, bounds.shape[-1] - 1, x.shape[3])
    if bounds.shape[:2] == (1, 1):
        return sums.index_add_(2, block_of[0, 0], x)
    x = x.expand(batch, heads, -1, -1)
    return sums.scatter_add_(2, block_of.expand(batch, heads, -1)[..., None].expand_as(x), x)


def in_order(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """`x` [B, H, S, D] taken in `order` [B|1, H|1, S]; None is the tokens' own order."""
    if order is None:
        return x
    if has_kernels(x):
        from pointillist.kernels.triton.permute import permute

        return permute(x, order, False)
    if order.shape[:2] == (1, 1):
        return x.index_select(2, order[0, 0])
    return x.gather(2, order.expand(*x.shape[:2], -1)[..., None].expand_as(x))


def restore_order(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The inverse of `in_order`: what is at each place goes back to its token."""
    if order is None:
        return x
    if has_kernels(x):
        from pointillist.kernels.triton.permute import permute

        return permute(x, order, True)
    if order.shape[:2] == (1, 1):
        return torch.empty_like(x).index_copy_(2, order[0, 0], x)
    return torch.empty_like(x).scatter_(2, order.expand(*x.shape[:2], -1)[..., None].expand_as(x), x)


def dropped_of(layout: BlockLayout) -> torch.Tensor:
    """The pairs that a tail may stand in for: neither kept nor forbidden. bool [B|1, H|1, nq, nk]."""
    dropped = ~layout.mask()
    valid = valid_places(layout.k_len, layout.key_lengths, layout.key_order, layout.device)
    if valid is None:
        return dropped
    return dropped & (_block_sums(valid[..., None].float(), layout.key_bounds) > 0)[:, :, None, :, 0]
