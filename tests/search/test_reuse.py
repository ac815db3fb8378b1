"""The best schedule of reused steps, against all schedules there are."""

from itertools import combinations

import numpy as np
import pytest

from pointillist.search.reuse import LONGEST, Recorded, best_reuse, schedules


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_no_schedule_is_better(steps):
    rng = np.random.default_rng()
    velocities = rng.standard_normal((steps, 5)).cumsum(0)
    sigmas = tuple(np.sort(rng.random(steps))[::-1] + 0.1)
    felt = rng.random(steps)
    found = best_reuse(Recorded(velocities @ velocities.T / 5, sigmas, felt))
    assert sorted(found) == list(range(2, steps + 1))
    for count, best in found.items():
        every = {
            (0, *rest): lost((0, *rest), velocities, sigmas, felt) for rest in combinations(range(1, steps), count - 1)
        }
        assert best.error == pytest.approx(min(every.values()), abs=1e-12)
        assert every[best.computed] == pytest.approx(best.error, abs=1e-12)
    assert found[steps].error == 0 and found[steps].computed == tuple(range(steps))


def lost(computed, velocities, sigmas, felt):
    total = 0.0
    for step in range(len(sigmas)):
        if step not in computed:
            length = sigmas[step] - (sigmas[step + 1] if step + 1 < len(sigmas) else 0)
            total += length * np.sqrt(felt[step]) * missed(step, computed, velocities, sigmas)
    return total**2


def missed(step, computed, velocities, sigmas):
    """Root mean square of what the line through the last two computed steps misses."""
    before = [each for each in computed if each < step][-2:]
    guess = velocities[before[-1]]
    if len(before) == 2:
        slope = (velocities[before[1]] - velocities[before[0]]) / (sigmas[before[1]] - sigmas[before[0]])
        guess = guess + slope * (sigmas[step] - sigmas[before[1]])
    return np.sqrt(np.square(guess - velocities[step]).mean())


def test_a_straight_line_needs_two_steps():
    sigmas = tuple(np.linspace(1, 0.05, 9))
    velocities = np.outer(sigmas, [1.0, -2.0, 0.5]) + 3
    found = best_reuse(Recorded(velocities @ velocities.T / 3, sigmas, np.ones(9)))
    assert found[2].error == pytest.approx(0, abs=1e-12)


def test_no_schedule_with_regions_is_better():
    """Against every choice of computed steps, and behind each of them of what the steps up to the next one do."""
    rng = np.random.default_rng()
    steps, price = 6, 0.02
    velocities = rng.standard_normal((steps, 5)).cumsum(0)
    sigmas, felt = tuple(np.sort(rng.random(steps))[::-1] + 0.1), rng.random(steps)
    in_regions = np.where(np.arange(steps) < 2, np.inf, np.array([[0.5], [20.0]]) * rng.random((2, steps)))
    recorded = Recorded(velocities @ velocities.T / 5, sigmas, felt, in_regions)
    some = schedules(recorded)
    assert len({(each.computed, each.region_after) for each in some}) == len(some)  # each of them once
    for count, best in best_reuse(recorded, price).items():
        every = {}
        for rest in combinations(range(1, steps), count - 1):
            computed = (0, *rest)
            for size in range(count + 1):
                for after in combinations(computed, size):
                    every[computed, after] = lost_with_regions(computed, after, velocities, recorded)
        priced = {
            key: np.sqrt(error) + price * sum(of(step, key[0]) in key[1] for step in range(steps) if step not in key[0])
            for key, error in every.items()
        }
        mine = (best.computed, best.region_after)
        assert every[mine] == pytest.approx(best.error, rel=1e-9, abs=1e-12)
        assert priced[mine] == pytest.approx(min(priced.values()), rel=1e-9, abs=1e-12)


def of(step, computed):
    return max(each for each in computed if each < step)


def lost_with_regions(computed, after, velocities, recorded):
    total, sigmas = 0.0, recorded.sigmas
    for step in (each for each in range(len(sigmas)) if each not in computed):
        last = of(step, computed)
        length = sigmas[step] - (sigmas[step + 1] if step + 1 < len(sigmas) else 0)
        if last in after and (last == 0 or step - last > LONGEST):
            return np.inf
        if last in after:
            kept = recorded.in_regions[0, step] * np.sqrt(np.square(velocities[last] - velocities[step]).mean())
            keys = recorded.in_regions[1, step] * (sigmas[last] - sigmas[step])
            keys *= sigmas[of(last, computed)] - sigmas[step]
            total += length * np.sqrt(recorded.felt[step]) * np.hypot(kept, keys)
        else:
            total += length * np.sqrt(recorded.felt[step]) * missed(step, computed, velocities, sigmas)
    return total**2
