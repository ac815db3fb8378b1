"""`diagonal` against a band over tokens that plain sorting puts in order."""

import itertools
import random

import pytest
import torch

from pattern_checks import assert_covers, laid_out, make_call, selected, video_mask
from pointillist.accel.layouts import lay_out
from pointillist.accel.orders import AXES
from pointillist.accel.patterns.diagonal import Diagonal


def places_along(grid, order):
    """The place of every token, in the sequence's order, when sorted by the axes of `order`."""
    tokens = list(itertools.product(*map(range, grid)))
    by_axes = sorted(tokens, key=lambda token: [token["thw".index(axis)] for axis in order])
    return [by_axes.index(token) for token in tokens]


def band(grid, order, size, sink=False):
    places, frame = places_along(grid, order), grid[1] * grid[2]
    reach = int(size * (len(places) - 1))
    rows = [[abs(a - b) <= reach or (sink and j < frame) for j, b in enumerate(places)] for a in places]
    return torch.tensor(rows)[None, None]


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("order", AXES)
def test_the_band_is_along_the_order(order, sink):
    grid = (random.randint(2, 5), random.randint(1, 6), random.randint(1, 6))
    size = random.choice([random.uniform(0.001, 0.3), random.uniform(0.001, 1)])
    call = make_call(grid, block=random.randint(1, 9))
    assert_covers(Diagonal(size, order=order, sink=sink), call, band(grid, order, size, sink))


def test_the_first_frame_is_seen_wherever_the_order_puts_it():
    """By frame and not by the first places of the order: and without blocks that all hold some of its tokens."""
    grid = (6, 9, 10)
    call = make_call(grid, batch=1, heads=1)
    for order in ("hwt", "wth", "thw"):
        for density in (0.3, 0.6):
            pattern = Diagonal.at_density(density, grid, block=16, order=order, sink=True)
            assert pattern.sink and pattern.order == order
            laid = laid_out(pattern, call)
            kept = video_mask(laid, call)[0, 0]
            assert kept[:, :90].all() and not kept[:, 90:180].all()
            assert float(laid.density) == pytest.approx(density, abs=0.04)


@pytest.mark.parametrize("order", ["hwt", "thw"])
def test_a_scattered_first_frame_can_be_dense(order):
    call = make_call((5, 6, 7), batch=1, heads=2)
    plain = laid_out(Diagonal(0.1, order=order, sink=True), call)
    kept, before = video_mask(lay_out(plain.parts, call, True), call), video_mask(plain, call)
    assert kept[:, :, :42].all() and not before[:, :, :42].all()
    assert torch.equal(kept[:, :, 42:], before[:, :, 42:])


def test_an_image_has_no_frame_that_is_a_sink():
    call = make_call((1, 9, 10), batch=1, heads=1)
    for order in ("thw", "wht"):
        with_sink, without = (selected(Diagonal(0.1, order=order, sink=sink), call).mask for sink in (True, False))
        assert torch.equal(with_sink, without) and not without.all()
        assert Diagonal.at_density(0.4, call.grid, block=16, order=order, sink=True).size < 0.5


def test_size_1_is_everything_and_0_nothing_but_its_own_block():
    call = make_call((5, 6, 7), batch=1, heads=1)
    for order in AXES:
        assert selected(Diagonal(1.0, order=order), call).mask.all()
        least = selected(Diagonal(1e-3, order=order), call)
        assert torch.equal(least.mask[0, 0], torch.eye(least.keys.count, dtype=torch.bool))


def test_orders_that_are_no_axes_are_refused():
    with pytest.raises(ValueError, match="allowed"):
        Diagonal.at_density(0.3, (3, 4, 5), order="tiles")
