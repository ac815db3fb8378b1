"""`masses` keeps the blocks that hold the exact softmax mass, and keeps to its choice."""

import itertools
from dataclasses import replace

import pytest
import torch

from pattern_checks import laid_out, make_call, selected, video_mask
from pointillist.accel.layouts import Group, sub_call
from pointillist.accel.patterns.masses import Masses, exact_masses, kept_mass, packed, unpacked
from pointillist.accel.tiles import Segment

GRID = (5, 6, 7)
BESIDE = (Segment("text", 0, 9), Segment("video", 9, 210), Segment("pad", 219, 4), Segment("condition", 223, 5))


def plain_weights(call):
    """[B, H, N, N] float64: softmax over all keys, rows and columns of the video."""
    before = {each.kind: each for each in call.segments}["video"].start
    count = call.grid[0] * call.grid[1] * call.grid[2]
    weights = (call.q.double() @ call.k.double().mT * call.scale).softmax(-1)
    return weights[:, :, before : before + count, before : before + count]


def plain_masses(call, blocks):
    """[B, H, n, n]: block by block, the mean over queries of the weight on the keys."""
    order, bounds, weights = blocks.order[0, 0], blocks.bounds[0, 0].tolist(), plain_weights(call)
    parts = [order[start:stop] for start, stop in itertools.pairwise(bounds)]
    masses = torch.empty(*weights.shape[:2], len(parts), len(parts), dtype=torch.float64)
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            masses[:, :, i, j] = weights[:, :, rows][..., columns].sum(-1).mean(-1)
    return masses


@pytest.mark.parametrize("order", ["tiles", "thw", "hilbert"])
@pytest.mark.parametrize("segments", [None, BESIDE])
def test_masses_are_those_of_the_dense_softmax(order, segments):
    call = make_call(GRID, segments=segments, smooth=2)
    blocks = selected(Masses(0.3, order=order), call).keys
    torch.testing.assert_close(exact_masses(call, blocks).double(), plain_masses(call, blocks), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("order", ["tiles", "thw"])
@pytest.mark.parametrize("segments", [None, BESIDE])
@pytest.mark.parametrize("rows", [1, 4, 50])
def test_masses_of_some_rows_are_means_over_them(order, segments, rows):
    call = make_call(GRID, segments=segments, smooth=2)
    blocks = selected(Masses(0.3, order=order), call).keys
    found, weights = exact_masses(call, blocks, rows).double(), plain_weights(call)
    parts = [blocks.order[0, 0][a:b] for a, b in itertools.pairwise(blocks.bounds[0, 0].tolist())]
    for i, part in enumerate(parts):
        some = part[[int((row + 0.5) * len(part) / rows) for row in range(rows)]]
        assert rows > len(part) or len(set(some.tolist())) == rows
        for j, columns in enumerate(parts):
            expected = weights[:, :, some][..., columns].sum(-1).mean(-1)
            torch.testing.assert_close(found[:, :, i, j], expected, atol=1e-5, rtol=1e-3)
    assert not torch.equal(exact_masses(call, blocks), exact_masses(call, blocks, 4))


@pytest.mark.parametrize("order", ["tiles", "thw"])
def test_a_row_keeps_its_own_block_and_the_highest_masses_per_token(order):
    call = make_call(GRID, smooth=2)
    selection = selected(Masses(0.3, order=order, rule="row"), call)
    n, sizes = selection.keys.count, selection.keys.sizes[0, 0].double()
    worth = plain_masses(call, selection.keys) / sizes
    for b in range(2):
        for h in range(3):
            for i in range(n):
                kept = {j for j in range(n) if selection.mask[b, h, i, j]}
                assert len(kept) == round(0.3 * n) and i in kept
                least = min(worth[b, h, i, j] for j in kept - {i})
                most = max(worth[b, h, i, j] for j in set(range(n)) - kept)
                assert least >= most * (1 - 1e-4)


def test_every_row_of_a_head_reaches_the_same_share_of_its_mass():
    """LoSA: a block is kept if the heavier ones before it hold less than a share that all rows have in common."""
    call = make_call(GRID, smooth=3)
    selection = selected(Masses(0.3), call)
    n, sizes = selection.keys.count, selection.keys.sizes[0, 0].double()
    masses = plain_masses(call, selection.keys)
    numbers = set()
    for b in range(2):
        for h in range(3):
            reached, missed = 0.0, 1.0
            for i in range(n):
                ranked = sorted(range(n), key=lambda j, row=masses[b, h, i] / sizes, i=i: (j != i, -row[j]))
                before = 0.0
                for j in ranked:
                    if selection.mask[b, h, i, j]:
                        reached = max(reached, before if j != i else 0.0)
                    else:
                        missed = min(missed, before)
                    before += float(masses[b, h, i, j])
                numbers.add(int(selection.mask[b, h, i].sum()))
            assert reached <= missed + 1e-4
            area = float(sizes @ selection.mask[b, h].double() @ sizes) / float(sizes.sum()) ** 2
            assert abs(area - 0.3) < 0.02
    assert len(numbers) > 1


def head_call(batch_scales):
    """Heads whose attention is the more peaked the larger their number: q and k alike along waves over the grid."""
    call = make_call(GRID, heads=len(batch_scales[0]), smooth=2)
    return replace(call, q=call.q * torch.tensor(batch_scales)[:, :, None, None])


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_heads_that_need_little_give_to_those_that_need_more(density):
    call = head_call([[0.1, 8.0, 0.5, 4.0, 0.2], [0.3, 0.1, 0.2, 12.0, 0.1]])
    plain = selected(Masses(density, rule="row"), call)
    masses, sizes = plain_masses(call, plain.keys), plain.keys.sizes[0, 0].double()
    moved = min(density / 2, 1 - density)
    selection = selected(Masses(density, rule="row", head_budget=True), call)
    n, given = plain.keys.count, 0
    for b in range(2):
        recall = []
        for h in range(5):
            kept = (masses[b, h] * plain.mask[b, h]).sum(-1)
            recall.append(float(kept @ sizes / sizes.sum()))
        number = min(sum(each > 0.8 for each in recall), 5 // 2)
        given += number
        ranked = sorted(range(5), key=lambda h, recall=recall: -recall[h])
        for place, h in enumerate(ranked):
            change = -moved if place < number else moved if place >= 5 - number else 0
            assert (selection.mask[b, h].sum(-1) == round((density + change) * n)).all()
    assert given > 1
    assert 0 < int(selection.mask.sum()) <= selection.pairs


def test_recall_counts_what_lies_beside_the_video_as_kept():
    call = make_call(GRID, segments=BESIDE, smooth=2)
    selection = selected(Masses(0.3), call)
    masses, sizes = plain_masses(call, selection.keys), selection.keys.sizes[0, 0].double()
    dropped = ((masses * ~selection.mask).sum(-1) * sizes).sum(-1) / sizes.sum()
    recall = kept_mass(exact_masses(call, selection.keys), selection.mask, selection.keys)
    torch.testing.assert_close(recall.double(), 1 - dropped, atol=1e-4, rtol=1e-4)


def test_the_choice_of_the_last_dense_step_stays():
    dense, later = make_call(GRID, smooth=2, step=3), make_call(GRID, smooth=2, step=40)
    pattern, memory = Masses(0.2), {}
    expected = video_mask(laid_out(pattern, dense), dense)
    pattern.prepare(sub_call(Group(pattern), replace(dense, memory=memory)), dense.q)
    frozen = replace(later, memory=memory)
    assert torch.equal(video_mask(laid_out(pattern, frozen), frozen), expected)
    assert not torch.equal(video_mask(laid_out(pattern, later), later), expected)


def test_it_is_measured_anew_after_so_many_steps():
    calls = [make_call(GRID, smooth=2, step=step) for step in range(7)]
    for refresh, measured_at in ((0, [0] * 7), (3, [0, 0, 0, 3, 3, 3, 6])):
        memory = {}
        for step, call in enumerate(calls):
            mask = selected(Masses(0.2, refresh=refresh), replace(call, memory=memory)).mask
            fresh = replace(calls[measured_at[step]], memory={})
            assert torch.equal(mask, selected(Masses(0.2), fresh).mask)


def test_packed_masks_come_back():
    for columns in (1, 7, 8, 9, 31):
        mask = torch.rand(2, 3, 5, columns) < 0.5
        bits = packed(mask)
        assert bits.shape == (2, 3, 5, -(-columns // 8)) and bits.dtype == torch.uint8
        assert torch.equal(unpacked(bits, columns), mask)


@pytest.mark.parametrize("options", [{"order": "spiral"}, {"rule": "best"}, {"refresh": -1}, {"rows": -1}])
def test_values_that_are_not_allowed_are_refused(options):
    with pytest.raises(ValueError, match="allowed"):
        Masses(0.3, **options)
