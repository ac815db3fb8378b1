"""`antidiagonal` against its definition, square by square and pair by pair."""

import math
from dataclasses import replace

import pytest
import torch

from pattern_checks import laid_out, make_call, selected, video_mask
from pointillist.accel.patterns import antidiagonal
from pointillist.accel.patterns.antidiagonal import Antidiagonal, antidiagonal_masses
from pointillist.accel.tiles import Segment


def plain_masses(call, blocks, stride):
    """[B, H, n, n] float64 by loops: mean scores of antidiagonals, softmax over a row of squares, sums per block."""
    bounds, order = blocks.bounds[0, 0].tolist(), blocks.order[0, 0].tolist()
    squares, block_of = [], []
    for i in range(blocks.count):
        tokens = order[bounds[i] : bounds[i + 1]]
        squares += [tokens[start : start + stride] for start in range(0, len(tokens), stride)]
        block_of += [i] * -(-len(tokens) // stride)
    scores = call.video_q.double() @ call.video_k.double().mT * call.scale
    batch, heads = scores.shape[:2]
    masses = torch.zeros(batch, heads, blocks.count, blocks.count, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            table = scores[b, h].tolist()
            for r, rows in enumerate(squares):
                weights = []
                for columns in squares:
                    on_it = [
                        table[rows[x]][columns[stride - 1 - x]]
                        for x in range(len(rows))
                        if stride - 1 - x < len(columns)
                    ]
                    weights.append(len(columns) * math.exp(sum(on_it) / len(on_it)) if on_it else 0.0)
                for c, weight in enumerate(weights):
                    share = weight / sum(weights) * len(rows) / (bounds[block_of[r] + 1] - bounds[block_of[r]])
                    masses[b, h, block_of[r], block_of[c]] += share
    return masses


@pytest.mark.parametrize(
    ("grid", "block", "stride", "order"),
    [
        ((3, 5, 7), 16, 4, "thw"),
        ((3, 5, 7), 18, 4, "hwt"),
        ((2, 4, 8), 16, 8, "thw"),
        ((3, 6, 5), 20, 3, "tiles"),
        ((3, 5, 5), 16, 8, "frames"),
        ((1, 9, 11), 12, 16, "gilbert"),
    ],
)
def test_masses_are_those_of_antidiagonals(grid, block, stride, order):
    call = make_call(grid, block=block, heads=2, smooth=2)
    stride = min(stride, block)
    blocks = selected(Antidiagonal(0.3, stride, order), call).keys
    assert blocks.largest <= block and (order in ("tiles", "frames") or blocks.largest % stride == 0)
    masses = antidiagonal_masses(call, blocks, stride)
    torch.testing.assert_close(masses.double(), plain_masses(call, blocks, stride), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masses.sum(-1), torch.ones_like(masses[..., 0]))


def test_a_row_keeps_its_own_block_and_the_highest_masses_per_token():
    call = make_call((3, 5, 7), heads=2, smooth=2)
    selection = selected(Antidiagonal(0.4, stride=4, rule="row"), call)
    n = selection.keys.count
    worth = plain_masses(call, selection.keys, 4) / selection.keys.sizes[0, 0]
    for b in range(2):
        for h in range(2):
            for i in range(n):
                kept = {j for j in range(n) if selection.mask[b, h, i, j]}
                assert len(kept) == round(0.4 * n) and i in kept
                least = min(worth[b, h, i, j] for j in kept - {i})
                assert least >= max(worth[b, h, i, j] for j in set(range(n)) - kept) * (1 - 1e-4)
    assert int(selection.mask.sum()) <= selection.pairs


def test_a_single_heavy_key_is_found_wherever_it_lies_in_its_square():
    """An antidiagonal touches every column of a square: no phase of the keys is overlooked."""
    grid = (4, 6, 8)
    for token in range(96, 104):
        call = make_call(grid, heads=1, smooth=0)
        q = call.q.abs()
        k = call.k * 0.1
        k[:, :, token] = 8.0
        kept = video_mask(laid_out(Antidiagonal(0.2, rule="row"), replace(call, q=q, k=k)), call)
        assert kept[..., token].all()


def test_it_does_not_matter_how_many_rows_are_scored_at_once(monkeypatch):
    call = make_call((3, 5, 7), smooth=2)
    blocks = selected(Antidiagonal(0.3, stride=4), call).keys
    whole = antidiagonal_masses(call, blocks, 4)
    monkeypatch.setattr(antidiagonal, "SCORES_AT_ONCE", 2 * 3 * 4 * 28 * 2)
    torch.testing.assert_close(antidiagonal_masses(call, blocks, 4), whole)


def test_only_the_video_is_scored():
    segments = (Segment("text", 0, 5), Segment("video", 5, 105), Segment("condition", 110, 3))
    call = make_call((3, 5, 7), segments=segments, smooth=2)
    alone = replace(make_call((3, 5, 7)), q=call.q[:, :, 5:110], k=call.k[:, :, 5:110])
    assert torch.equal(selected(Antidiagonal(0.3), call).mask, selected(Antidiagonal(0.3), alone).mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_at_least_float32(dtype):
    call = make_call((3, 5, 7))
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
    blocks = selected(Antidiagonal(0.3, stride=4), call).keys
    masses = antidiagonal_masses(call, blocks, 4)
    assert masses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(masses.double(), plain_masses(call, blocks, 4), atol=1e-5, rtol=1e-4)


def test_videos_smaller_than_a_square_are_kept_whole():
    call = make_call((1, 1, 3), block=16)
    selection = selected(Antidiagonal(0.3, stride=8), call)
    assert selection.mask.shape[2:] == (1, 1) and selection.mask.all()
    assert antidiagonal_masses(call, selection.keys, 8).isfinite().all()


@pytest.mark.parametrize("options", [{"stride": 0}, {"order": "spiral"}, {"rule": "best"}])
def test_values_that_are_not_allowed_are_refused(options):
    with pytest.raises(ValueError, match="allowed"):
        Antidiagonal(0.3, **options)
