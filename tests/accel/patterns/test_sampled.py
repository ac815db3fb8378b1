"""Sampled attention among tokens of blocks: BLADE's mask, PSA's importance."""

import itertools
import math

import pytest
import torch

from pattern_checks import make_call, selected
from pointillist.accel.patterns import sampled
from pointillist.accel.patterns.choose import choose
from pointillist.accel.patterns.pooled import Pooled
from pointillist.accel.patterns.sampled import Sampled, sample

GRIDS = [(5, 6, 7), (3, 9, 4), (1, 11, 13)]


def chosen_tokens(blocks, samples):
    """Of every block its tokens in the middle of `samples` equal parts, or all if it has no more."""
    order, bounds = blocks.order[0, 0].tolist(), blocks.bounds[0, 0].tolist()
    chosen = []
    for start, stop in itertools.pairwise(bounds):
        size = stop - start
        places = range(size) if size <= samples else [int((i + 0.5) * size / samples) for i in range(samples)]
        chosen.append([order[start + place] for place in places])
    return chosen


def expected_scores(call, blocks, samples, reduce):
    chosen, n = chosen_tokens(blocks, samples), blocks.count
    scores = torch.empty(*call.q.shape[:2], n, n)
    keys = [token for block in chosen for token in block]
    stops = [sum(map(len, chosen[: i + 1])) for i in range(n)]
    for b in range(call.q.shape[0]):
        for h in range(call.q.shape[1]):
            for i, block in enumerate(chosen):
                probabilities = (call.video_q[b, h, block] @ call.video_k[b, h, keys].T * call.scale).softmax(-1)
                for j in range(n):
                    pair = probabilities[:, stops[j] - len(chosen[j]) : stops[j]]
                    scores[b, h, i, j] = math.log(float(pair.max() if reduce == "max" else pair.mean()))
    return scores


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("order", "samples"), [("tiles", 5), ("gilbert", 3), ("thw", 32)])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_scores_are_the_reduced_attention_of_samples(grid, order, samples, reduce):
    call = make_call(grid, smooth=2)
    selection = selected(Sampled(0.3, order=order, rule="row", samples=samples, reduce=reduce), call)
    scores = expected_scores(call, selection.keys, samples, reduce)
    n = selection.keys.count
    for b, h, i in torch.cartesian_prod(*(torch.arange(length) for length in (2, 3, n))).tolist():
        row = scores[b, h, i].tolist()
        ranked = sorted(range(n), key=lambda j: (j != i, -row[j]))
        assert set(selection.mask[b, h, i].nonzero()[:, 0].tolist()) == set(ranked[: max(1, round(0.3 * n))])
    for rule in ("mass", "head"):
        found = selected(Sampled(0.3, order=order, rule=rule, samples=samples, reduce=reduce), call)
        expected = choose(scores, found.queries, found.keys, 0.3, rule)
        assert (found.mask != expected).float().mean() < 0.01  # rounding may turn near ties
        assert int(found.mask.sum()) <= found.pairs


def test_samples_are_evenly_spaced_in_long_blocks_and_all_of_short_ones():
    """72 tokens in blocks of 16 along a curve: four of 16 and one of 8."""
    tokens, valid, full = sample("thw", (2, 6, 6), 16, 12, torch.device("cpu"))
    assert tokens[0].tolist() == [0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15] and valid[:4].all()
    assert tokens[4][valid[4]].tolist() == list(range(64, 72)) and not full
    assert sample("thw", (2, 6, 6), 16, 8, torch.device("cpu"))[2]


def test_parts_of_the_scores_make_the_whole(monkeypatch):
    call = make_call((5, 6, 7), smooth=2)
    whole = Sampled(0.3, samples=4)._scores(call)
    monkeypatch.setattr(sampled, "SCORES_AT_ONCE", 2 * 3 * 14 * 4 * 4 * 5)
    torch.testing.assert_close(Sampled(0.3, samples=4)._scores(call), whole)


def test_the_maximum_finds_a_strong_key_that_the_mean_hides():
    """One key of a block is what all queries look for, and its neighbours are its opposite."""
    call = make_call((1, 8, 8), batch=1, heads=1)
    blocks = selected(Sampled(0.5), call).keys
    tokens = blocks.order[0, 0, 16:32]
    call.q.zero_()[..., 0] = 8
    call.k.zero_()[:, :, tokens, 0] = -1
    call.k[:, :, tokens[3], 0] = 6
    assert selected(Sampled(0.5, rule="row", samples=16), call).mask[0, 0, :, 1].all()
    assert not selected(Pooled(0.5, "tiles"), call).mask[0, 0, :, 1].all()


def test_scores_far_apart_do_not_underflow():
    """Probabilities below the smallest float32 still have an order: a row has its own block and the best other one."""
    call = make_call((1, 8, 8), batch=1, heads=1)
    blocks = selected(Sampled(0.5), call).keys
    call.q.zero_()[..., 0] = 100
    call.k.zero_()
    for number, level in enumerate((0.0, -20.0, -10.0, -30.0)):
        call.k[:, :, blocks.order[0, 0, 16 * number : 16 * number + 16], 0] = level
    mask = selected(Sampled(0.5, rule="row", samples=4), call).mask[0, 0]
    assert mask.tolist() == [[True, False, True, False], [True, True, False, False], [True, False, True, False],
                             [True, False, False, True]]  # fmt: skip
