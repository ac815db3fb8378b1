"""`a_shape` against a plain band and the first tokens."""

import itertools
import random

import pytest
import torch

from pattern_checks import assert_covers, laid_out, make_call, selected, video_mask
from pointillist.accel.orders import AXES
from pointillist.accel.patterns.a_shape import AShape


def plain(grid, order, size, sink):
    tokens = list(itertools.product(*map(range, grid)))
    by_axes = sorted(tokens, key=lambda token: [token["thw".index(axis)] for axis in order])
    places = [by_axes.index(token) for token in tokens]
    reach = int(size * (len(tokens) - 1))
    return torch.tensor([[abs(a - b) <= reach or b < min(sink, reach) for b in places] for a in places])[None, None]


@pytest.mark.parametrize("order", AXES)
def test_the_first_tokens_and_a_band_are_seen(order):
    grid = tuple(random.randint(1, 6) for _ in range(3))
    for sink in (0, random.randint(1, 20), 128):
        size = random.uniform(0.001, 0.6)
        call = make_call(grid, block=random.randint(1, 9))
        assert_covers(AShape(size, order=order, sink=sink), call, plain(grid, order, size, sink))


def test_the_sink_is_seen_by_the_last_query_and_both_sides_are():
    call = make_call((6, 5, 6), batch=1, heads=1, block=5)
    kept = video_mask(laid_out(AShape(0.2, sink=10), call), call)[0, 0]
    assert kept[-1, :10].all() and not kept[-1, 10:40].any()
    assert kept[90, 60] and kept[90, 120]
    without = video_mask(laid_out(AShape(0.2, sink=0), call), call)[0, 0]
    assert not without[-1, :10].any()


def test_a_small_density_is_not_all_sink():
    grid = (5, 6, 7)
    call = make_call(grid, batch=1, heads=1, block=5)
    pattern = AShape.at_density(0.1, grid, block=5)
    assert pattern.sink == 128
    assert float(laid_out(pattern, call).density) == pytest.approx(0.1, abs=0.03)


def test_size_1_is_everything_and_0_nothing_but_its_own_block():
    call = make_call((5, 6, 7), batch=1, heads=1)
    assert selected(AShape(1.0), call).mask.all()
    least = selected(AShape(1e-3), call)
    assert torch.equal(least.mask[0, 0], torch.eye(least.keys.count, dtype=torch.bool))


@pytest.mark.parametrize("wrong", [{"order": "gilbert"}, {"sink": -1}])
def test_values_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="allowed"):
        AShape.at_density(0.3, (3, 4, 5), **wrong)
