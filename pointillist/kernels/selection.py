"""From scores of block pairs to the pairs that are kept, on the scores' device and without waiting for it."""

import torch


def top_k(scores: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The `keep` highest of every row: bool like `scores` [B, H, nq, nk].

    Args:
        keep: for all rows, or an integer tensor on the CPU with one number per head [H].
    """
    if isinstance(keep, int):
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(keep, dim=-1).indices, True)
    most = int(keep.max())
    highest = scores.topk(most, dim=-1).indices
    within = (torch.arange(most) < keep[:, None])[None, :, None].to(scores.device, non_blocking=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, highest, within.expand_as(highest))


def top_p(masses: torch.Tensor, p: float | torch.Tensor, at_least: int = 1) -> torch.Tensor:
    """The fewest highest of every row whose sum reaches the share `p` of the row's; the crossing one is kept.

    Args:
        masses: [B, H, nq, nk], 0 or more. Equal ones are taken in their order.
        p: a share in (0, 1], or a tensor that broadcasts against [B, H, nq, 1].
        at_least: so many are kept in any case.
    """
    highest, order = masses.sort(dim=-1, descending=True, stable=True)
    before = highest.cumsum(-1) - highest
    kept = before < p * highest.sum(-1, keepdim=True)
    kept[..., :at_least] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def above(scores: torch.Tensor, z: float) -> torch.Tensor:
    """Those above mean + z · std of their row, and the highest in any case: no sort (Sol-Attn; Spark)."""
    threshold = scores.mean(-1, keepdim=True) + z * scores.std(-1, keepdim=True, correction=0)
    return (scores > threshold) | (scores == scores.amax(-1, keepdim=True))
