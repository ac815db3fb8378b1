"""`stripe` against its definitions, stripe by stripe."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pattern_checks import make_call, selected
from pointillist.accel.blocks import blocks_in
from pointillist.accel.patterns.rows import sampled_places
from pointillist.accel.patterns.stripe import Stripe

GRID = (5, 6, 7)


def tokens_of_blocks(order, block=16):
    blocks = blocks_in(order, GRID, block, torch.device("cpu"))
    bounds = blocks.bounds[0, 0].tolist()
    return [blocks.order[0, 0, start:stop].tolist() for start, stop in pairwise(bounds)]


def taken(wishes, blocks, groups, density):
    """bool [n, n] from {(group, key block): wish}: the highest wishes until the token pairs reach the density."""
    members = [[i for i in range(len(blocks)) if groups[i] == group] for group in range(max(groups) + 1)]
    budget = density * sum(map(len, blocks)) ** 2 - sum(len(each) ** 2 for each in blocks)
    mask, area = torch.eye(len(blocks), dtype=torch.bool), 0
    for group, key in sorted(wishes, key=lambda pair: -wishes[pair]):
        more = sum(len(blocks[i]) * len(blocks[key]) for i in members[group] if i != key)
        if area + more / 2 <= budget:
            mask[members[group], key] = True
        area += more
    for group, rows in enumerate(members):
        best = max(range(len(blocks)), key=lambda key: wishes[group, key])
        mask[rows, best] = True
    return mask


def in_double(call):
    return replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())


@pytest.mark.parametrize("order", ["tiles", "thw", "hilbert"])
def test_all_queries_see_the_blocks_of_the_most_mass(order):
    call, blocks = in_double(make_call(GRID, smooth=2)), tokens_of_blocks(order)
    for density in (0.05, 0.2, 0.45):
        selection = selected(Stripe(density, order=order), call)
        for b in range(2):
            for h in range(3):
                mass = torch.zeros(210, dtype=torch.float64)
                for query in sampled_places(210):
                    mass += (call.k[b, h] @ call.q[b, h, query] * call.scale).softmax(0)
                wishes = {(0, key): float(mass[tokens].mean()) for key, tokens in enumerate(blocks)}
                expected = taken(wishes, blocks, [0] * len(blocks), density)
                assert torch.equal(selection.mask[b, h], expected)


@pytest.mark.parametrize(("order", "step"), [("tiles", 4), ("tiles", 1), ("thw", 3), ("thw", 99)])
def test_groups_see_the_blocks_that_fall_least_short_of_their_anchor(order, step):
    call, blocks = in_double(make_call(GRID, smooth=2)), tokens_of_blocks(order)
    count = len(blocks)
    groups = [i // step for i in range(count)]
    for density in (0.2, 0.45):
        selection = selected(Stripe(density, by="anchor", step=step, order=order), call)
        for b in range(2):
            for h in range(3):
                wishes = {}
                for group in range(max(groups) + 1):
                    rows = [i for i in range(count) if groups[i] == group]
                    query = call.q[b, h, [token for i in rows for token in blocks[i]]].mean(0)
                    scores = [float(query @ call.k[b, h, tokens].mean(0) * call.scale) for tokens in blocks]
                    region = {0} | {j for i in rows for j in (i - 1, i, i + 1) if 0 <= j < count}
                    anchor = max(scores[j] for j in region)
                    wishes |= {(group, j): scores[j] - anchor for j in range(count)}
                assert torch.equal(selection.mask[b, h], taken(wishes, blocks, groups, density))


def test_a_column_that_all_look_at_is_a_stripe():
    call, direction = make_call(GRID), torch.full((16,), 2.0)
    q, k = 0.1 * call.q, 0.1 * call.k
    q[1, 2] += direction
    k[1, 2, 77] += direction
    holder = next(i for i, tokens in enumerate(tokens_of_blocks("frames")) if 77 in tokens)
    for by in ("mass", "anchor"):
        assert selected(Stripe(0.2, by=by), replace(call, q=q, k=k)).mask[1, 2, :, holder].all()


def test_options_are_checked():
    with pytest.raises(ValueError, match="by is 'score'"):
        Stripe(0.2, by="score")
    with pytest.raises(ValueError, match="step is 0"):
        Stripe(0.2, step=0)
