"""`radial` against the paper's rule, pair of frames by pair of frames."""

import math
import random

import pytest
import torch

from pattern_checks import assert_covers, make_call, selected
from pointillist.accel.orders import places_of
from pointillist.accel.patterns.geometry import Places
from pointillist.accel.patterns.radial import Radial


def rule(grid, size, least, sink):
    """bool [1, 1, N, N]: near bands whole, others log-decaying and thinned out; all of them grown up to size 0.5."""
    frames, n = grid[0], grid[1] * grid[2]
    power = 2 ** n.bit_length()
    enough = 2 ** (frames - 1).bit_length() * max(1, least / power)
    decay = 0.2 if size <= 0.5 else 0.2 * (enough / 0.2) ** (2 * size - 1)
    wanted = torch.zeros(frames * n, frames * n, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            distance = min(1, abs(i - j)) if sink and j == 0 else abs(i - j)
            if distance <= 1:
                width = power
            else:
                decayed = power / 2 ** distance.bit_length()
                every = 1
                while 2 * every * decayed * max(1, decay) <= least:
                    every *= 2
                width = max(decay * decayed, least) if distance % every == 0 else 0
            width *= min(1, max(0, 4 * size - abs(i - j) / frames))
            for p in range(n):
                for r in range(max(0, math.floor(p - width)), min(n, math.ceil(p + width) + 1)):
                    wanted[i * n + p, j * n + r] = abs(p - r) < width
    return wanted[None, None]


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("least", [2, 5, 16, 128])
@pytest.mark.parametrize("grid", [(9, 3, 3), (1, 8, 7), (4, 4, 5)])
def test_bands_are_what_the_rule_says(grid, least, sink):
    size = random.uniform(0.01, 1)
    order = random.choice(["thw", "frames", "tiles"])
    pattern = Radial(size, order=order, sink=sink, least=least)
    assert_covers(pattern, make_call(grid, block=random.randint(1, 9)), rule(grid, size, least, sink))


@pytest.mark.parametrize("sink", [True, False])
def test_the_middle_size_is_the_setting_of_the_paper(sink):
    """Decay 0.2, written once more without anything that depends on the size; least 8 makes 9 frames thin out."""
    grid, least = (9, 3, 7), 8
    power, n = 32, 21
    wanted = torch.zeros(189, 189, dtype=torch.bool)
    for a in range(189):
        for b in range(189):
            d, apart = abs(a // n - b // n), abs(a % n - b % n)
            g = d.bit_length()
            thin = int(least / (power / 2**g)) if power / 2**g < least else 1
            band = apart < max(0.2 * power / 2**g, least) and d % thin == 0
            wanted[a, b] = d <= 1 or (sink and b < n) or band
    assert not wanted[:n, 5 * n : 6 * n].any(), "thinned out"
    assert_covers(Radial(0.5, sink=sink, least=least), make_call(grid, block=4), wanted[None, None])


def test_beyond_the_middle_the_decay_grows():
    grid = (9, 4, 7)
    t, h, w = places_of(grid).unbind(1)
    for size in (0.6, 0.7, random.uniform(0.5, 1)):
        queries, keys = Places(t[:, None], h[:, None], w[:, None], grid), Places(t[None], h[None], w[None], grid)
        assert torch.equal(Radial(size, least=3).wants(queries, keys), rule(grid, size, 3, True)[0, 0])


def test_a_larger_size_sees_all_that_a_smaller_one_sees():
    call = make_call((9, 4, 5), batch=1, heads=1, block=1)
    for least in (4, 32):
        before = torch.eye(180, dtype=torch.bool)
        for size in sorted(random.uniform(0.001, 1) for _ in range(5)):
            kept = selected(Radial(size, least=least), call).mask[0, 0]
            assert (kept | ~before).all()
            before = kept


def test_the_first_frame_is_seen_by_all():
    call = make_call((9, 5, 7), batch=1, heads=1, block=5)
    with_sink, without = (selected(Radial(0.5, sink=sink, least=4), call).mask[0, 0] for sink in (True, False))
    assert with_sink[:, :7].all() and not without[:, :7].all()
    assert torch.equal(with_sink[:, 7:], without[:, 7:])


@pytest.mark.parametrize("grid", [(9, 3, 5), (1, 9, 7)])
def test_size_1_is_everything_and_0_nothing_but_its_own_block(grid):
    call = make_call(grid, batch=1, heads=1)
    assert selected(Radial(1.0), call).mask.all()
    least = selected(Radial(1e-3), call)
    assert torch.equal(least.mask[0, 0], torch.eye(least.keys.count, dtype=torch.bool))


@pytest.mark.parametrize("wrong", [{"order": "random"}, {"least": 0}])
def test_values_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="allowed"):
        Radial.at_density(0.3, (3, 4, 5), **wrong)
