"""`semantic`: every cluster of alike queries sees the clusters of alike keys that hold most of its softmax mass.

k-means sorts queries and keys by content instead of place, so that a block's mean speaks for its tokens better than a
tile's does (Sparse VideoGen 2; Routing Transformer). The score of a pair of clusters is that of their means, q̄·k̄/√D;
top-p with a floor fills the budget. Centroids move on from step to step.

Its options make other methods of it: `routing="error"` is SVG-EAR, which keeps what a pooled tail would get most wrong
instead of what weighs most; `balanced` cuts clusters of equal size (ClusterAttention).

Queries and keys are clustered apart, so a token need not see itself. To keep for every query cluster all key clusters
with tokens of its own would take 0.15 to 0.2 of all pairs in the embedded model, the whole of many a budget.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from pointillist.accel.blocks import Blocks, block_means
from pointillist.accel.patterns.choose import RULES, block_masses_of, choose, mass_before, within_budget
from pointillist.accel.patterns.halving import halves
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, check_range
from pointillist.kernels import k_means, pool_blocks
from pointillist.kernels.layout import block_of_place
from pointillist.kernels.pooling import in_order

LEAST_CLUSTERS = 8
SCORES_AT_ONCE = 2**25
"""Products of query means with keys in memory at a time, 128 MiB; those of one query mean if they are more."""


@dataclass(frozen=True)
class Semantic(Pattern):
    density: float
    query_clusters: int = 0
    """0: as many as there are blocks, and at least 8 (the paper: 300 for 75 600 tokens)."""
    key_clusters: int = 0
    """0: twice as many as there are blocks, if not balanced, and at least 8 (the paper: 1000)."""
    iterations_first: int = 8
    """Of k-means in a generation's first call, which is its last dense step if it has any."""
    iterations: int = 1
    """Of k-means in later calls, from the centroids of the call before. A second one finds no better pairs in the
    embedded model and doubles the time; the paper makes 2."""
    rule: str = "mass"
    """How a head's budget is shared among its query clusters: see `choose.py`."""
    floor: float = 0.1
    """Share of the keys that every query cluster keeps in any case, in its best clusters; at most the density."""
    routing: str = "probability"
    """`error`: beside the floor, every query cluster spends its part of the budget where the mean square error of a
    pooled tail is largest."""
    balanced: bool = False
    """Clusters of equal size, give or take one, by halving along the direction of largest variance again and again."""

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_choice("routing", self.routing, ("probability", "error"))
        check_range("floor", self.floor, 0, 1)
        for name, least in (("query_clusters", 0), ("key_clusters", 0), ("iterations_first", 1), ("iterations", 1)):
            check_range(name, getattr(self, name), least, 1_000_000)

    def prepare(self, call: Call, out: torch.Tensor) -> None:
        """The first, long k-means, so that the first sparse step only has to move the centroids."""
        if not self.balanced:
            self._cluster(call)

    def select(self, call: Call) -> Selection:
        (queries, query_means), (keys, key_means) = self._cluster(call)
        scores = (query_means @ key_means.mT * call.scale).masked_fill((keys.sizes == 0)[:, :, None], float("-inf"))
        floor, mask = self._most_probable(scores, queries, keys)
        if self.routing == "error":
            errors = log_errors(query_means, call.video_k, call.video_v, keys, key_means, call.scale) + 2 * scores
            mask = within_rows(errors.masked_fill(floor & mask, float("inf")), keys, mask)
        mask = mask & (queries.sizes > 0)[..., None]
        return Selection(queries, keys, mask, mask.numel())

    def _most_probable(self, scores: torch.Tensor, queries: Blocks, keys: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        """The floor's pairs and those kept. Where floor and rule exceed the budget together, the pairs with the most
        mass above them in their row give way, as if top-p had been asked for less."""
        area = queries.sizes[..., None] * keys.sizes[..., None, :]
        floor = within_budget(scores, area, min(self.floor, self.density), per_row=True)
        wanted = choose(scores, queries, keys, self.density, self.rule, own=False) | floor
        before = mass_before(scores, block_masses_of(scores, keys))
        return floor, within_budget((floor.to(before) - before).masked_fill(~wanted, float("-inf")), area, self.density)

    def _cluster(self, call: Call) -> list[tuple[Blocks, torch.Tensor]]:
        """Queries and keys as blocks with their means [B, H, n, D], float32 or wider."""
        found = []
        for name, x, count in (("q", call.video_q, self.query_clusters), ("k", call.video_k, self.key_clusters)):
            tokens = x.shape[2]
            blocks = tokens if name == "q" or self.balanced else 2 * tokens
            count = min(tokens, count or max(LEAST_CLUSTERS, -(-blocks // call.block)))
            wide = torch.promote_types(x.dtype, torch.float32)
            if self.balanced:
                halved = halves(x, count)
                found.append((halved, block_means(x, halved).to(wide)))
                continue
            known = call.memory.get(name)
            start = x.index_select(2, _first_tokens(tokens, count, x.device)) if known is None else known
            iterations = self.iterations_first if known is None else self.iterations
            clusters = k_means(x, count, iterations=iterations, centroids=start)
            call.memory[name] = clusters.centroids
            found.append((Blocks.of_clusters(clusters), clusters.centroids.to(wide)))
        return found


@lru_cache(maxsize=64)
def _first_tokens(tokens: int, count: int, device: torch.device) -> torch.Tensor:
    """int64 [count]: different tokens at random, the same in every head and batch entry."""
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:count].to(device)


def log_errors(
    query_means: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Blocks, key_means: torch.Tensor, scale: float
) -> torch.Tensor:
    """What a pooled tail gets wrong, for each token pair, float32 or wider [B, H, nq, nk] (SVG-EAR).

    ln mean_t ‖e^(q̄·k_t) v_t − e^(q̄·k̄) v̄‖² less 2 q̄·k̄, over the tokens t of a key cluster: with d_t = q̄·(k_t − k̄) the
    mean is that of e^2d_t ‖v_t‖² − 2 e^d_t v_t·v̄ + ‖v̄‖², one product of all keys with the query means.
    """
    batch, heads, tokens, _ = k.shape
    of_place = block_of_place(keys.bounds, tokens).expand(batch, heads, -1)[..., None].expand_as(k)
    k, v = (in_order(x, keys.order).to(key_means.dtype) for x in (k, v))
    v_means = pool_blocks(v, keys.bounds)[0]
    deviations = (k - key_means.gather(2, of_place)).mT * scale
    squares, products = v.square().sum(-1), 2 * (v * v_means.gather(2, of_place)).sum(-1)
    most = 0.45 * math.log(torch.finfo(k.dtype).max)  # of which the square of the exponential is finite
    found = []
    for some in query_means.split(max(1, min(64, SCORES_AT_ONCE // (batch * heads * tokens))), dim=2):
        growth = (some @ deviations).clamp(max=most).exp()
        errors = growth * (growth * squares[:, :, None] - products[:, :, None])
        found.append(pool_blocks(errors.mT, keys.bounds)[0].mT)
    errors = torch.cat(found, dim=2) + v_means.square().sum(-1)[:, :, None]
    return errors.clamp(min=torch.finfo(errors.dtype).tiny).log()


def within_rows(rank: torch.Tensor, keys: Blocks, mask: torch.Tensor) -> torch.Tensor:
    """The pairs of highest `rank`, in every row about as many keys as `mask` keeps there. −inf is never kept."""
    sizes = keys.sizes[..., None, :].expand(rank.shape)
    highest, order = rank.sort(dim=-1, descending=True, stable=True)
    in_rank = sizes.gather(-1, order)
    taken = in_rank.cumsum(-1) - in_rank / 2 <= (sizes * mask).sum(-1, keepdim=True)
    taken[..., 0] = True
    return torch.zeros_like(mask).scatter_(-1, order, taken & (highest > float("-inf")))


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Semantic)
