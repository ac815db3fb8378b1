"""From scores of block pairs to the pairs that a density keeps.

The rules differ in how they share the budget of a head among its query blocks:

    row     every query block keeps the same share of the keys (top-k)
    mass    every query block keeps the same share of its softmax mass, so flat rows keep more than peaked ones
            (top-p as of Sparse VideoGen 2 and LoSA, with the recall that spends exactly the budget; ZipVL)
    hybrid  half of the budget as `row`, the rest as `mass` (SpargeAttention2)
    head    the highest masses of the whole head, wherever they are (DraftAttention)
    above   scores above mean + z·std of their row, z from the Gaussian tail: no sort (Sol-Attn; Spark)
"""

import torch

from pointillist.accel.blocks import Blocks
from pointillist.accel.patterns.pattern import Selection, check_choice
from pointillist.kernels import above, top_k

RULES = ("row", "mass", "hybrid", "head", "above")


def tiles_kept(density: float, tiles: int) -> int:
    """The whole number of key tiles, at least 1, whose share of all tiles is nearest to `density`."""
    return min(tiles, max(1, round(density * tiles)))


def select_blocks(
    scores: torch.Tensor, blocks: Blocks, density: float, rule: str = "row", recall: float = 0.0
) -> Selection:
    """What `choose` keeps of pairs of the same blocks [B, H, n, n], every block itself among them."""
    mask = choose(scores, blocks, blocks, density, rule, recall=recall)
    pairs = mask.numel()
    if rule == "row" and blocks.even and recall == 0:
        pairs = pairs // blocks.count * tiles_kept(density, blocks.count)
    return Selection(blocks, blocks, mask, pairs)


def choose(
    scores: torch.Tensor,
    queries: Blocks,
    keys: Blocks,
    density: float,
    rule: str = "row",
    own: bool | torch.Tensor = True,
    recall: float = 0.0,
) -> torch.Tensor:
    """Keep the share `density` of the token pairs of every head.

    Args:
        scores: [B, H, nq, nk], the logarithm of the softmax mass for each token of a key block, up to a constant for
            each row: for a row's order a block counts what it costs. −inf is never kept.
        own: query block i and key block i hold the same tokens, and every block sees itself; or bool [nq, nk], the
            pairs to keep in any case.
        recall: if above 0, keep the fewest blocks of every row that hold this share of its softmax mass instead, the
            crossing one among them (LoSA; ZipVL): the density is what that gives.

    Returns:
        bool like scores. Where the blocks of a head differ in size, the last one taken may exceed the budget.
    """
    check_choice("rule", rule, RULES)
    ranked = _first(scores, own)
    if recall > 0:
        return mass_before(ranked, block_masses_of(scores, keys)) < recall
    if rule == "above":
        z = float(torch.special.ndtri(torch.tensor(1.0 - density, dtype=torch.float64)))
        return above(scores, z) | (ranked == float("inf"))
    if rule == "row" and keys.even:
        return top_k(ranked, tiles_kept(density, keys.count)) & (ranked > float("-inf"))
    area = queries.sizes[..., None] * keys.sizes[..., None, :]
    if rule == "row":
        return within_budget(ranked, area, density, per_row=True)
    masses = block_masses_of(scores, keys)
    if rule == "head":
        return within_budget(_first(masses.masked_fill(scores == float("-inf"), float("-inf")), own), area, density)
    before = mass_before(ranked, masses)
    if rule == "mass":
        return within_budget(-before, area, density)
    floor = within_budget(ranked, area, density / 2, per_row=True)
    return within_budget((-before).masked_fill(floor, float("inf")), area, density)


def block_masses_of(scores: torch.Tensor, keys: Blocks) -> torch.Tensor:
    """Softmax over a row's blocks, each weighted by its tokens: the share of the mass that each block holds."""
    best = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weighted = (scores - best).exp() * keys.sizes[..., None, :]
    return weighted / weighted.sum(-1, keepdim=True).clamp(min=1e-30)


def within_budget(rank: torch.Tensor, area: torch.Tensor, density: float, per_row: bool = False) -> torch.Tensor:
    """The pairs of highest `rank` [B, H, nq, nk] until their token pairs reach the share `density`.

    A pair is taken if the area taken before it and half of its own are within the budget: the realised share is the
    nearest possible. Every row keeps its highest pair. −inf is never kept. Ties go by place.
    """
    area = area.expand(rank.shape)
    flat_rank, flat_area = (x if per_row else x.flatten(2) for x in (rank, area))
    highest, order = flat_rank.sort(dim=-1, descending=True, stable=True)
    sorted_area = flat_area.gather(-1, order).double()
    before = sorted_area.cumsum(-1) - sorted_area / 2
    taken = (before <= density * sorted_area.sum(-1, keepdim=True)) & (highest > float("-inf"))
    kept = torch.zeros_like(taken).scatter_(-1, order, taken).view(rank.shape)
    best = rank.argmax(-1, keepdim=True)
    return kept.scatter_(-1, best, rank.gather(-1, best) > float("-inf"))


def _first(scores: torch.Tensor, own: bool | torch.Tensor) -> torch.Tensor:
    """The scores with `own` pairs above all others."""
    if isinstance(own, torch.Tensor):
        return scores.masked_fill(own, float("inf"))
    if own:
        scores = scores.clone()
        scores.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    return scores


def mass_before(ranked: torch.Tensor, masses: torch.Tensor) -> torch.Tensor:
    """The mass of all blocks of its row that rank above each one; +inf for those of rank −inf, −1 for those of +inf."""
    highest, order = ranked.sort(dim=-1, descending=True, stable=True)
    in_order = masses.gather(-1, order)
    before = in_order.cumsum(-1) - in_order
    before = before.masked_fill(highest == float("inf"), -1).masked_fill(highest == float("-inf"), float("inf"))
    return torch.empty_like(before).scatter_(-1, order, before)
