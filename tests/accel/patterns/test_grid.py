"""`grid` against its definition, pair by pair."""

from dataclasses import replace

import pytest
import torch

from pattern_checks import GRIDS, covered, laid_out, make_call, selected, video_mask
from pointillist.accel.patterns.grid import Grid, strides_of
from pointillist.accel.patterns.rows import sampled_places


def in_double(call):
    """In the precision of the plain definition; the last head looks away from itself, at what is 23 tokens on."""
    k = call.k.clone()
    k[:, -1] = 2 * call.q[:, -1].roll(23, 1)
    return replace(call, q=call.q.double(), k=k.double(), v=call.v.double())


def plain(q, k, scale, stride, block, density, ranks_by=None):
    """(tokens by place, ranks of phases, bool [n, n], mass that sampled rows hold) of one head for one stride."""
    tokens = len(q)
    rows = {place: (k @ q[place] * scale).softmax(0).tolist() for place in sampled_places(tokens)}
    mass = [0.0] * stride
    for query, row in rows.items():
        for key, weight in enumerate(row):
            mass[(key - query) % stride] += weight
    ranking = [0, *sorted(range(1, stride), key=lambda phase: -mass[phase])] if ranks_by is None else ranks_by
    ranks = {phase: rank for rank, phase in enumerate(ranking)}
    order = sorted(range(tokens), key=lambda i: (i % stride, i // stride))
    blocks = [order[start : start + block] for start in range(0, tokens, block)]
    centres = [sum(each) / len(each) / tokens for each in blocks]
    wishes = []
    for i, queries in enumerate(blocks):
        for j, keys in enumerate(blocks):
            rank = min(ranks[(key - query) % stride] for query in queries for key in keys)
            wishes.append((-1 if i == j else rank + abs(centres[i] - centres[j]), i, j))
    mask, area = torch.eye(len(blocks), dtype=torch.bool), 0
    for _, i, j in sorted(wishes):
        own = len(blocks[i]) * len(blocks[j])
        if area + own / 2 <= density * tokens**2:
            mask[i, j] = True
        area += own
    held = sum(
        row[key]
        for i, queries in enumerate(blocks)
        for j, keys in enumerate(blocks)
        if mask[i, j]
        for query, row in rows.items()
        if query in queries
        for key in keys
    )
    return order, ranking, mask, held


@pytest.mark.parametrize("grid", [(5, 6, 7), (3, 9, 4), (1, 11, 13)])
def test_heads_keep_the_heaviest_phases_of_their_best_stride(grid):
    call = in_double(make_call(grid, smooth=2))
    for density in (0.2, 0.45):
        selection = selected(Grid(density), call)
        for b in range(2):
            for h in range(3):
                candidates = [
                    plain(call.q[b, h], call.k[b, h], call.scale, stride, 16, density) for stride in strides_of(grid)
                ]
                order, _, mask, _ = max(candidates, key=lambda candidate: candidate[3])
                assert selection.queries.order[b, h].tolist() == order
                assert torch.equal(selection.mask[b, h], mask)


def test_whole_phases_fit_and_the_next_one_is_the_only_one_kept_in_part():
    """The pairs of tokens that are wanted have a relative phase among the chosen ones."""
    grid, density = (5, 6, 7), 0.5
    call = in_double(make_call(grid, smooth=2, batch=1, heads=2))
    selection, tokens = selected(Grid(density), call), torch.arange(210)
    sizes = selection.keys.sizes[0, 0]
    for h in range(2):
        stride = next(s for s in strides_of(grid) if selection.queries.order[0, h].tolist()
                      == sorted(range(210), key=lambda i: (i % s, i // s)))  # fmt: skip
        ranking = plain(call.q[0, h], call.k[0, h], call.scale, stride, 16, density)[1]
        relative, before = (tokens - tokens[:, None]) % stride, torch.eye(14, dtype=torch.bool)
        for count in range(1, stride + 1):
            wanted = torch.isin(relative, torch.tensor(ranking[:count]))[None, None].expand(1, 2, -1, -1)
            now = covered(wanted, selection.queries, selection.keys)[0, h]
            if (now * sizes[:, None] * sizes).sum() > density * 210**2:
                break
            before = now
        assert count > 1, "some phase fits"
        assert (selection.mask[0, h] | ~before).all()
        assert (now | ~selection.mask[0, h]).all()


def test_the_stride_is_that_of_the_structure():
    """Head 0 looks at the same place in all frames, head 1 at the same column."""
    grid, tokens = (8, 8, 8), torch.arange(512)
    place, column = torch.randn(64, 16), torch.randn(8, 16)
    heads = torch.stack([place[tokens % 64], column[tokens % 8]])[None] * 3
    call = replace(make_call(grid, batch=1, heads=2), q=heads, k=heads, v=heads)
    kept = video_mask(laid_out(Grid(0.2), call), call)[0]
    same = (tokens - tokens[:, None]) % 64 == 0, (tokens - tokens[:, None]) % 8 == 0
    for h in range(2):
        assert (kept[h] | ~same[h]).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_spread_heads_see_every_key_together(grid):
    call = make_call(grid, heads=4, block=2)
    kept = video_mask(laid_out(Grid(0.7, spread=True), call), call)
    assert kept.any(1).all()
    orders = selected(Grid(0.7, spread=True), call).queries.order
    assert (orders == orders[:, :1]).all(), "they share the stride"


def test_spread_heads_begin_with_phases_of_their_own():
    grid, density = (5, 6, 7), 0.3
    call = in_double(make_call(grid, smooth=2))
    selection = selected(Grid(density, spread=True), call)
    for b in range(2):
        totals, found = [], []
        for stride in strides_of(grid):
            heads = []
            for h in range(3):
                start = h * stride // 3
                dealt = [0, *(phase % stride or None for phase in range(start, start + stride))]
                heads.append(plain(call.q[b, h], call.k[b, h], call.scale, stride, 16, density, dealt))
            totals.append(sum(head[3] for head in heads))
            found.append(heads)
        for h, (order, _, mask, _) in enumerate(found[totals.index(max(totals))]):
            assert selection.queries.order[b, h].tolist() == order
            assert torch.equal(selection.mask[b, h], mask)


def test_strides_lie_between_one_and_the_video():
    assert strides_of((5, 6, 7)) == (7, 14, 42, 84)
    assert strides_of((1, 11, 13)) == (13, 26)
    assert strides_of((1, 1, 9)) == (1,)
    call = make_call((1, 1, 40), smooth=1)
    near = selected(Grid(0.5), call).mask
    assert near[0, 0].tolist() == [[True, False, False], [False, True, True], [False, True, True]]
