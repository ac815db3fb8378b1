"""From scores of block pairs to the pairs that are kept, on the scores' device and without waiting for it."""

import torch


def top_k(scores: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The `keep` highest of every row: bool like `scores` [B, H, nq, nk].

    Args:
        keep: for all rows, or an integer tensor on the CPU with one number per head [H].

    Raises:
        ValueError: a number is not within 1 and nk, or there is not one for each head.
    """
    columns = scores.shape[-1]
    if isinstance(keep, torch.Tensor):
        fits = keep.device.type == "cpu" and not keep.is_floating_point() and tuple(keep.shape) == (scores.shape[1],)
        least, most = (int(keep.min()), int(keep.max())) if fits else (0, 0)
    else:
        least = most = keep if isinstance(keep, int) else 0
    if not 1 <= least <= most <= columns:
        raise ValueError(
            f"keep is {keep!r} for scores {tuple(scores.shape)}; it must be a whole number from 1 to {columns}, or a "
            "tensor on the CPU with one such number per head"
        )
    highest = scores.topk(most, dim=-1).indices
    if not isinstance(keep, torch.Tensor) or least == most:
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, highest, True)
    within = (torch.arange(most) < keep[:, None])[None, :, None].to(scores.device, non_blocking=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, highest, within.expand_as(highest))


def top_p(masses: torch.Tensor, p: float | torch.Tensor, at_least: int = 1) -> torch.Tensor:
    """The fewest highest of every row whose sum reaches the share `p` of the row's; the crossing one is kept.

    Args:
        masses: [B, H, nq, nk], 0 or more. Equal ones are taken in their order; sums are float32 or wider.
        p: a share in (0, 1], 1 keeping all that is above 0; or a tensor that broadcasts against [B, H, nq, 1].
        at_least: so many are kept in any case.

    Raises:
        ValueError: `p` or `at_least` is out of range.
    """
    if (not isinstance(p, torch.Tensor) and not 0 < p <= 1) or not 1 <= at_least <= masses.shape[-1]:
        raise ValueError(f"p is {p} and at_least {at_least}; allowed are (0, 1] and 1 to {masses.shape[-1]}")
    wide = masses.to(torch.promote_types(masses.dtype, torch.float32))
    highest, order = wide.sort(dim=-1, descending=True, stable=True)
    before = highest.cumsum(-1) - highest
    share = torch.as_tensor(p, dtype=wide.dtype, device=wide.device)
    kept = (before < share * highest.sum(-1, keepdim=True)) | ((share >= 1) & (highest > 0))
    kept[..., :at_least] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def above(scores: torch.Tensor, z: float) -> torch.Tensor:
    """Those above mean + z · std of their row, and the highest in any case: no sort (Sol-Attn; Spark).

    Scores of −inf are never kept and do not count; a row of nothing else keeps nothing.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    counted = wide > float("-inf")
    number = counted.sum(-1, keepdim=True).clamp(min=1)
    mean = wide.masked_fill(~counted, 0).sum(-1, keepdim=True) / number
    variance = (wide - mean).masked_fill(~counted, 0).square().sum(-1, keepdim=True) / number
    return counted & ((wide > mean + z * variance.sqrt()) | (wide == wide.amax(-1, keepdim=True)))
