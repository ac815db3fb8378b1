"""The best schedule of reused steps, against all schedules there are."""

from itertools import combinations

import numpy as np
import pytest

from pointillist.search.reuse import best_reuse


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_no_schedule_is_better(steps):
    rng = np.random.default_rng()
    velocities = rng.standard_normal((steps, 5)).cumsum(0)
    sigmas = tuple(np.sort(rng.random(steps))[::-1] + 0.1)
    felt = rng.random(steps)
    found = best_reuse(velocities @ velocities.T / 5, sigmas, felt)
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
            before = [each for each in computed if each < step][-2:]
            guess = velocities[before[-1]]
            if len(before) == 2:
                slope = (velocities[before[1]] - velocities[before[0]]) / (sigmas[before[1]] - sigmas[before[0]])
                guess = guess + slope * (sigmas[step] - sigmas[before[1]])
            length = sigmas[step] - (sigmas[step + 1] if step + 1 < len(sigmas) else 0)
            total += length * np.sqrt(felt[step] * np.square(guess - velocities[step]).mean())
    return total**2


def test_a_straight_line_needs_two_steps():
    sigmas = tuple(np.linspace(1, 0.05, 9))
    velocities = np.outer(sigmas, [1.0, -2.0, 0.5]) + 3
    found = best_reuse(velocities @ velocities.T / 3, sigmas, np.ones(9))
    assert found[2].error == pytest.approx(0, abs=1e-12)
