"""How a density is shared among a head's query blocks, against plain loops."""

import math

import pytest
import torch

from pointillist.accel.blocks import Blocks, blocks_in
from pointillist.accel.patterns.choose import RULES, choose

CPU = torch.device("cpu")


def ragged(batch: int, heads: int, sizes_of) -> Blocks:
    sizes = torch.tensor([[sizes_of() for _ in range(heads)] for _ in range(batch)])
    bounds = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int()
    order = torch.arange(int(sizes.sum(-1)[0, 0])).expand(batch, heads, -1)
    return Blocks(order, bounds, int(sizes.max()))


def random_sizes(count: int, tokens: int):
    cuts = torch.randint(0, tokens + 1, (count - 1,)).sort().values
    return torch.diff(torch.tensor([0, *cuts.tolist(), tokens])).tolist()


def plain(scores, q_sizes, k_sizes, density, rule, own):
    """One head in Python numbers."""
    rows, columns = len(q_sizes), len(k_sizes)
    total = sum(q_sizes) * sum(k_sizes)
    masses = []
    for i in range(rows):
        weights = [math.exp(scores[i][j]) * k_sizes[j] for j in range(columns)]
        masses.append([weight / sum(weights) for weight in weights])
    kept = [[False] * columns for _ in range(rows)]
    top = [max(range(columns), key=lambda j: (own(i, j), scores[i][j])) for i in range(rows)]

    def spend(pairs, rank, budget):
        spent = 0
        for i, j in sorted(pairs, key=rank, reverse=True):
            area = q_sizes[i] * k_sizes[j]
            if spent + area / 2 <= budget:
                kept[i][j] = True
            spent += area

    def above(i, j):
        """Mass ranked above j in its row; -1 for own pairs."""
        if own(i, j):
            return -1
        better = [m for m in range(columns) if (own(i, m), scores[i][m]) > (own(i, j), scores[i][j])]
        return sum(masses[i][m] for m in better)

    everything = [(i, j) for i in range(rows) for j in range(columns)]
    if rule == "row":
        for i in range(rows):
            spend(
                [(i, j) for j in range(columns)],
                lambda p: (own(*p), scores[p[0]][p[1]]),
                density * q_sizes[i] * sum(k_sizes),
            )
    elif rule == "head":
        spend(everything, lambda p: (own(*p), masses[p[0]][p[1]]), density * total)
        top = [max(range(columns), key=lambda j: (own(i, j), masses[i][j])) for i in range(rows)]
    elif rule == "mass":
        spend(everything, lambda p: -above(*p), density * total)
    for i in range(rows):
        kept[i][top[i]] = True
    return torch.tensor(kept)


@pytest.mark.parametrize("rule", ["row", "head", "mass"])
@pytest.mark.parametrize("own", [True, False])
def test_unequal_blocks_against_plain_loops(rule, own):
    for _ in range(4):
        queries = ragged(2, 2, lambda: [n + 1 for n in random_sizes(6, 40)])
        keys = ragged(2, 2, lambda: [n + 1 for n in random_sizes(6, 40)]) if not own else queries
        scores = 2 * torch.randn(2, 2, 6, 6, dtype=torch.float64)
        density = float(torch.empty(1).uniform_(0.1, 0.6))
        mask = choose(scores, queries, keys, density, rule, own=own)
        for b in range(2):
            for h in range(2):
                sizes = [x.sizes[b, h].int().tolist() for x in (queries, keys)]
                expected = plain(scores[b, h].tolist(), *sizes, density, rule, lambda i, j: own and i == j)
                assert torch.equal(mask[b, h], expected)


@pytest.mark.parametrize("rule", RULES)
def test_the_density_is_spent_and_every_row_keeps_its_own(rule):
    blocks = blocks_in("tiles", (5, 14, 15), 16, CPU)
    for density in (0.05, 0.2, 0.6):
        scores = torch.randn(2, 3, blocks.count, blocks.count)
        mask = choose(scores, blocks, blocks, density, rule)
        area = (mask.float() @ blocks.sizes[0, 0]) @ blocks.sizes[0, 0] / blocks.sizes.sum() ** 2
        assert mask.diagonal(dim1=-2, dim2=-1).all()
        assert (area - density).abs().max() <= max(0.03, 1.5 / blocks.count)


def test_rules_differ_as_they_say():
    """Flat rows keep more under `mass`, peaked heads' best pairs win under `head`, `hybrid` gives each row half."""
    blocks = blocks_in("thw", (1, 8, 32), 16, CPU)
    scores = torch.randn(1, 1, 16, 16)
    scores[:, :, :8] *= 6  # peaked rows
    kept = {rule: choose(scores, blocks, blocks, 0.25, rule)[0, 0].sum(-1) for rule in RULES}
    assert kept["row"].tolist() == [4] * 16
    assert kept["mass"][:8].sum() < kept["mass"][8:].sum()
    assert kept["hybrid"].min() >= 2 and kept["hybrid"].sum() == kept["mass"].sum() == 64
    assert kept["mass"].min() < kept["hybrid"].min() + 2


def test_a_recall_keeps_the_fewest_that_hold_it():
    blocks = blocks_in("thw", (1, 8, 32), 16, CPU)
    scores = 2 * torch.randn(1, 2, 16, 16)
    masses = scores.softmax(-1)
    for recall in (0.5, 0.9):
        mask = choose(scores, blocks, blocks, 0.3, own=False, recall=recall)
        held = (masses * mask).sum(-1)
        least = masses.masked_fill(~mask, 1).amin(-1)
        assert (held >= recall - 1e-5).all() and (held - least < recall + 1e-5).all()


def test_scores_of_minus_infinity_are_never_kept():
    blocks = blocks_in("thw", (1, 8, 32), 16, CPU)
    scores = torch.randn(1, 1, 16, 16)
    scores[..., 5] = float("-inf")
    for rule in RULES:
        assert not choose(scores, blocks, blocks, 1.0 if rule != "above" else 0.5, rule, own=False)[..., 5].any()


def test_unknown_rules_are_refused():
    blocks = blocks_in("thw", (1, 8, 32), 16, CPU)
    with pytest.raises(ValueError, match="allowed are row, mass"):
        choose(torch.randn(1, 1, 16, 16), blocks, blocks, 0.3, "best")
