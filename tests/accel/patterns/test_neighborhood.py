"""`neighborhood` against windows that are listed axis by axis."""

import itertools
import math
import random

import pytest
import torch

from pattern_checks import assert_covers, laid_out, make_call, selected, video_mask
from pointillist.accel.layouts import lay_out
from pointillist.accel.patterns.neighborhood import Neighborhood


def seen_on_axis(query, length, size, dilation=1, stride=1):
    """The coordinates that a query sees, as the papers define it."""
    step = min(dilation, length)
    alike = [place for place in range(length) if place % step == query % step]
    group = min(stride, len(alike))
    width = max(group, round(size * len(alike)))
    middle = alike.index(query) // group * group + group // 2
    first = min(max(min(middle, len(alike) - 1) - width // 2, 0), len(alike) - width)
    return set(alike[first : first + width])


def box(grid, **parameters):
    places = list(itertools.product(*map(range, grid)))
    windows = [[seen_on_axis(q, length, **parameters) for q in range(length)] for length in grid]
    rows = [[all(x in windows[a][y[a]] for a, x in enumerate(key)) for key in places] for y in places]
    return torch.tensor(rows)[None, None]


def small_grid():
    return tuple(random.randint(1, 6) for _ in range(3))


@pytest.mark.parametrize(("dilation", "stride"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2), (2, 3)])
@pytest.mark.parametrize("order", ["tiles", "frames", "hwt"])
def test_a_box_is_what_the_axes_say(dilation, stride, order):
    grid, size = small_grid(), random.uniform(0.01, 1)
    pattern = Neighborhood(size, order=order, dilation=dilation, stride=stride)
    wanted = box(grid, size=size, dilation=dilation, stride=stride)
    assert wanted.diagonal(dim1=-2, dim2=-1).all(), grid
    assert_covers(pattern, make_call(grid, block=random.randint(1, 9)), wanted)


@pytest.mark.parametrize("grid", [(5, 6, 7), (1, 9, 8)])
def test_a_circle_is_what_is_nearer_than_its_radius(grid):
    for size in (random.uniform(0.05, 0.6), 1.0):
        radius = size * math.sqrt(sum(length**2 for length in grid))
        places = list(itertools.product(*map(range, grid)))
        wanted = torch.tensor([[math.dist(q, k) < radius for k in places] for q in places])
        assert_covers(Neighborhood(size, shape="circle"), make_call(grid, block=4), wanted[None, None])
    assert wanted.all()


def test_windows_move_inwards_at_the_border():
    """Every query sees equally many tokens: in blocks of one token nothing is rounded up."""
    call = make_call((5, 7, 9), batch=1, heads=1, block=1)
    kept = video_mask(laid_out(Neighborhood(0.43), call), call)[0, 0]
    assert set(kept.sum(1).tolist()) == {2 * 3 * 4}


def test_a_group_shares_its_window():
    call = make_call((1, 8, 9), batch=1, heads=1, block=1)
    kept = video_mask(laid_out(Neighborhood(0.6, stride=3), call), call)[0, 0].view(8, 9, -1)
    for h, w in itertools.product(range(8), range(9)):
        assert torch.equal(kept[h, w], kept[h // 3 * 3, w // 3 * 3])
    assert not torch.equal(kept[2, 2], kept[3, 3])


def test_at_size_1_a_box_is_everything_and_at_0_nothing_but_its_own_block():
    call = make_call((5, 6, 7), batch=1, heads=1)
    assert selected(Neighborhood(1.0), call).mask.all()
    blocks = selected(Neighborhood(1e-3), call)
    assert torch.equal(blocks.mask[0, 0], torch.eye(blocks.keys.count, dtype=torch.bool))


def test_a_dilated_box_is_as_sparse_as_it_says():
    """Blocks hold tokens of the same remainders, so that the density ends where all of these are seen."""
    grid = (8, 12, 14)
    call = make_call(grid, batch=1, heads=1, block=16)
    for wished, reached in ((0.03, 0.03), (0.08, 0.08), (0.9, 1 / 8)):
        pattern = Neighborhood.at_density(wished, grid, block=16, dilation=2)
        assert pattern.dilation == 2
        assert float(laid_out(pattern, call).density) == pytest.approx(reached, abs=0.02)
    kept = video_mask(laid_out(pattern, call), call)[0, 0].view(*grid, *grid)
    assert not kept[0, 0, 0, 1::2].any() and not kept[0, 0, 0, :, 1::2].any()
    assert kept[3, 4, 5, 1::2, ::2, 1::2].all()


def test_a_dilated_pattern_takes_a_dense_first_frame():
    call = make_call((5, 6, 7), batch=1, heads=2)
    pattern = Neighborhood(0.3, dilation=2)
    plain = laid_out(pattern, call)
    kept, before = video_mask(lay_out(plain.parts, call, True), call), video_mask(plain, call)
    assert kept[:, :, :42].all() and torch.equal(kept[:, :, 42:], before[:, :, 42:])


@pytest.mark.parametrize(
    "wrong",
    [{"shape": "star"}, {"order": "random"}, {"dilation": 0}, {"stride": 0}, {"shape": "circle", "dilation": 2}],
)
def test_values_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="allowed"):
        Neighborhood.at_density(0.3, (3, 4, 5), **wrong)
