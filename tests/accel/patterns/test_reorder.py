"""`reorder`: every head in the order in which its attention is most block-like."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from pattern_checks import laid_out, make_call, selected, video_mask
from pointillist.accel.layouts import Group, sub_call
from pointillist.accel.patterns import reorder
from pointillist.accel.patterns.reorder import Reorder, block_likeness, chosen_axes, six_orders
from pointillist.accel.tiles import Segment

AXES = ("thw", "twh", "hwt", "htw", "wht", "wth")


def plain_order(name, grid):
    """Tokens with the letters' axes as loops, the first the outermost."""
    lengths = dict(zip("thw", grid, strict=True))
    order = []
    for place in itertools.product(*(range(lengths[axis]) for axis in name)):
        at = dict(zip(name, place, strict=True))
        order.append((at["t"] * grid[1] + at["h"]) * grid[2] + at["w"])
    return order


def plain_likeness(weights, order, block, sampled, keys):
    """Share of sparse blocks and mean of largest by mean weight of one head, weights [N, N]; loops over blocks."""
    parts = [order[start : start + block] for start in range(0, len(order), block)]
    sparse, ratios = [], []
    for i in sampled(len(parts)):
        for columns in parts:
            cell = weights[parts[i]][:, columns].flatten().tolist()
            small = sum(weight < 1e-3 * 17776 / keys for weight in cell)
            sparse.append(10 * small >= 9 * len(cell))
            ratios.append(max(cell) / (sum(cell) / len(cell)))
    return sum(sparse) / len(sparse), sum(ratios) / len(ratios)


def plain_scores(call, alpha, video=slice(None), sampled=range):
    """[B, H, 6] nested lists."""
    weights = (call.q.double() @ call.k.double().mT * call.scale).softmax(-1)[:, :, video, video]
    scores = []
    for b, h in itertools.product(range(weights.shape[0]), range(weights.shape[1])):
        found = [
            plain_likeness(weights[b, h], plain_order(name, call.grid), call.block, sampled, call.k.shape[2])
            for name in AXES
        ]
        sparse, uneven = (sum(each) for each in zip(*found, strict=True))
        scores.append([alpha * (1 - s / max(sparse, 1e-9)) + (1 - alpha) * u / uneven for s, u in found])
    return scores


def peaked(grid, **others):
    call = make_call(grid, smooth=2, **others)
    return replace(call, q=call.q * 2)


def test_orders_are_loops_over_the_axes():
    grid = (3, 4, 5)
    assert six_orders(grid, torch.device("cpu")).tolist() == [plain_order(name, grid) for name in AXES]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("grid", [(3, 5, 7), (2, 8, 8)])
def test_the_order_of_the_lowest_score_is_chosen(grid, alpha):
    call = peaked(grid)
    chosen = chosen_axes(call, alpha).flatten().tolist()
    for axes, scores in zip(chosen, plain_scores(call, alpha), strict=True):
        assert scores[axes] <= min(scores) + 1e-5


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_both_measures_count_in_their_share_of_the_six(monkeypatch, alpha):
    """Whatever their sizes: sparse ones are 0 to 1, largest by mean may be hundreds."""
    sparse, uneven = torch.rand(6, 4, 9), 1 + 99 * torch.rand(6, 4, 9)
    found = iter(zip(sparse, uneven, strict=True))
    monkeypatch.setattr(reorder, "block_likeness", lambda *_: next(found))
    chosen = chosen_axes(make_call((1, 1, 2)), alpha)
    for b, h in itertools.product(range(4), range(9)):
        s, u = sparse[:, b, h].tolist(), uneven[:, b, h].tolist()
        scores = [alpha * (1 - s[i] / sum(s)) + (1 - alpha) * u[i] / sum(u) for i in range(6)]
        assert scores[chosen[b, h]] <= min(scores) + 1e-6


def test_short_blocks_count_with_the_weights_that_they_have():
    weights, small = torch.rand(60, 5, 21), 0.9
    sparse, ratio = reorder._per_block(weights, 8, small)
    for head in range(60):
        cells = [weights[head, :, start : start + 8].flatten().tolist() for start in (0, 8, 16)]
        wanted = [10 * sum(each < small for each in cell) >= 9 * len(cell) for cell in cells]
        assert float(sparse[head]) == pytest.approx(sum(wanted) / 3)
        assert float(ratio[head]) == pytest.approx(sum(max(cell) * len(cell) / sum(cell) for cell in cells) / 3)


def test_both_measures_are_those_of_the_definition():
    """On a grid of more blocks than are sampled, with keys beside the video, whose share of the softmax counts.

    Heads look at 9 or 28 tokens evenly, with weights a little above what is small here, 0.068, and a little below.
    """
    segments = (Segment("text", 0, 5), Segment("video", 5, 252), Segment("condition", 257, 3))
    call, grid = peaked((4, 7, 9), segments=segments, heads=3, dim=64), (4, 7, 9)
    for x in (call.q, call.k):
        generator = torch.Generator().manual_seed(3)
        for head, axes in enumerate(("th", "w")):
            x[:, head, 5:257] = axis_head(grid, axes, 64, generator)
    weights = (call.q.double() @ call.k.double().mT * call.scale).softmax(-1)[:, :, 5:257, 5:257]
    for name, order in zip(AXES, six_orders(call.grid, call.device), strict=True):
        sparse, uneven = block_likeness(call, order)
        for b, h in itertools.product(range(2), range(3)):
            wanted = plain_likeness(
                weights[b, h], plain_order(name, call.grid), 16, lambda n: [i * (n - 1) // 7 for i in range(8)], 260
            )
            assert float(sparse[b, h]) == pytest.approx(wanted[0], abs=0.01)  # one block may be at the limit
            assert float(uneven[b, h]) == pytest.approx(wanted[1], rel=1e-3)


def test_heads_in_parts_are_measured_alike(monkeypatch):
    call = peaked((3, 5, 7))
    order = six_orders(call.grid, call.device)[2]
    whole = block_likeness(call, order)
    monkeypatch.setattr(reorder, "WEIGHTS_AT_ONCE", 2 * 16 * 105)
    torch.testing.assert_close(block_likeness(call, order), whole)


def axis_head(grid, axes, dim, generator=None):
    """q and k of a head whose tokens look where they agree in `axes`: directions by place along them."""
    lengths = dict(zip("thw", grid, strict=True))
    place = dict(zip("thw", torch.meshgrid(*map(torch.arange, grid), indexing="ij"), strict=True))
    code = torch.zeros(grid, dtype=torch.long)
    for axis in axes:
        code = code * lengths[axis] + place[axis]
    directions = torch.nn.functional.normalize(torch.randn(math.prod(grid), dim, generator=generator), dim=-1)
    return 12 * directions[code.flatten()]


def test_a_head_gets_the_order_that_makes_its_attention_blocks():
    """Batch entries and heads each for themselves: who looks along time wants time innermost, and so on."""
    grid, dim = (8, 4, 4), 64
    wanted = [("hw", {"hwt", "wht"}), ("t", {"thw", "twh"}), ("tw", {"twh", "wth"})]
    by_entry = [wanted, wanted[::-1]]
    q = torch.stack([torch.stack([axis_head(grid, axes, dim) for axes, _ in entry]) for entry in by_entry])
    call = replace(make_call(grid, block=8, dim=dim), q=q, k=q, v=q)
    chosen = chosen_axes(call, 0.5)
    for b, h in itertools.product(range(2), range(3)):
        assert AXES[chosen[b, h]] in by_entry[b][h][1], (b, h, by_entry[b][h][0])


def test_a_head_along_time_keeps_all_it_looks_at():
    """At the density of its own blocks; frame by frame its attention is in every block."""
    grid, dim = (8, 4, 4), 64
    q = axis_head(grid, "hw", dim)[None, None]
    call = replace(make_call(grid, batch=1, heads=1, block=8, dim=dim), q=q, k=q, v=q)
    kept = video_mask(laid_out(Reorder(1 / 16), call), call)[0, 0]
    place = torch.arange(128) % 16
    assert torch.equal(kept, place[:, None] == place)


@pytest.mark.parametrize("rule", ["row", "head"])
def test_the_heaviest_blocks_of_the_head_s_order_are_kept(rule):
    call = peaked((3, 5, 7))
    selection = selected(Reorder(0.3, rule=rule), call)
    chosen, weights = chosen_axes(call, 0.5), (call.q.double() @ call.k.double().mT * call.scale).softmax(-1)
    for b, h in itertools.product(range(2), range(3)):
        order = plain_order(AXES[chosen[b, h]], call.grid)
        assert selection.queries.order[b, h].tolist() == selection.keys.order[b, h].tolist() == order
        parts = [order[start : start + 16] for start in range(0, 105, 16)]
        masses = torch.tensor([[float(weights[b, h][r][:, c].mean(0).sum()) for c in parts] for r in parts])
        worth = masses / torch.tensor([float(len(part)) for part in parts])
        if rule == "head":  # by mass in the share of the row, as a matter of the whole head
            worth = masses / masses.sum(-1, keepdim=True)
        kept = selection.mask[b, h]
        off_diagonal = ~torch.eye(7, dtype=torch.bool)
        assert kept.diagonal().all()
        groups = [slice(i, i + 1) for i in range(7)] if rule == "row" else [slice(None)]
        for rows in groups:
            least = worth[rows][(kept & off_diagonal)[rows]].min()
            assert least >= worth[rows][~kept[rows]].max() * (1 - 1e-4)
        if rule == "row":
            assert (kept.sum(-1) == round(0.3 * 7)).all()
        sizes = torch.tensor([float(len(part)) for part in parts])
        assert abs(float(sizes @ kept.float() @ sizes) / 105**2 - 0.3) < 0.04


def test_order_and_pairs_stay_and_pairs_may_be_chosen_anew():
    calls = [replace(peaked((3, 5, 7)), step=step) for step in range(8)]
    first = selected(Reorder(0.3), replace(calls[0], memory={}))
    for options, changes in (
        ({}, []),
        ({"refresh": 2}, [2, 4, 6]),
        ({"refresh": 2, "until": 5}, [2, 4]),
    ):
        memory, before = {}, None
        for step, call in enumerate(calls):
            selection = selected(Reorder(0.3, **options), replace(call, memory=memory))
            assert torch.equal(selection.keys.order, first.keys.order)
            if step:
                assert torch.equal(selection.mask, before) != (step in changes)
            before = selection.mask
    others = [selected(Reorder(0.3), replace(call, memory={})).keys.order for call in calls]
    assert not all(torch.equal(order, first.keys.order) for order in others)


def test_it_learns_at_the_last_dense_step():
    dense, later = peaked((3, 5, 7)), peaked((3, 5, 7))
    pattern, memory = Reorder(0.3), {}
    expected = video_mask(laid_out(pattern, dense), dense)
    pattern.prepare(sub_call(Group(pattern), replace(dense, memory=memory)), dense.q)
    assert torch.equal(video_mask(laid_out(pattern, replace(later, memory=memory)), later), expected)
    assert not torch.equal(video_mask(laid_out(pattern, later), later), expected)


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"rule": "best"}, {"refresh": -1}, {"until": -1}])
def test_values_that_are_not_allowed_are_refused(options):
    with pytest.raises(ValueError, match="allowed"):
        Reorder(0.3, **options)
