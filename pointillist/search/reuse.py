"""Which steps to compute, if others reuse what they gave: for every number of computed steps, those with least error.

A reused step's velocity is a straight line through those of the last two computed steps. Of a recorded dense run all
inner products of velocities are known, so the error of any such line is known without running the model. Errors of
steps point the same way for the most part, so their lengths are added up: each times how far the latents go in the step
and how much the clip feels it. That sum is least along a shortest path over pairs of computed steps (the idea of
LeMiCa's paths, with the predictor taken into account).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Reuse:
    """Some steps are computed, what they gave is reused by the others."""

    computed: tuple[int, ...]
    error: float
    """Predicted mean squared error of the clip."""


def best_reuse(products: np.ndarray, sigmas: tuple[float, ...], felt: np.ndarray) -> dict[int, Reuse]:
    """The best schedule for each number of computed steps, from 2 to all; the first step is always one of them.

    Args:
        products: float64 [steps, steps], mean products of the guided velocities of every two steps.
        sigmas: of the steps.
        felt: [steps], mean squared error of the clip for each of the latents, by step.
    """
    steps = len(sigmas)
    costs = _costs(products, np.array(sigmas), felt)  # [before, last, next]
    # least[before, last]: the least sum up to the computed step `last`, with `before` the computed step before it
    least = np.full((steps, steps), np.inf)
    least[0, 0] = 0.0
    trail: list[np.ndarray] = []
    found: dict[int, Reuse] = {}
    for count in range(2, steps + 1):
        sums = least[:, :, None] + costs[:, :, :steps]  # [before, last, next]
        trail.append(sums.argmin(0))  # [last, next]: the step before `last`
        least = sums.min(0)
        ends = least + costs[:, :, steps]
        before, last = np.unravel_index(int(ends.argmin()), ends.shape)
        path = [int(last), int(before)]
        for known in reversed(trail[1:]):
            path.append(int(known[path[-1], path[-2]]))
        found[count] = Reuse(tuple(reversed(path)), float(ends.min()) ** 2)
    return found


def _costs(products: np.ndarray, sigmas: np.ndarray, felt: np.ndarray) -> np.ndarray:
    """[steps, steps, steps + 1]: the root of the clip's error if the steps between `last` and `next` continue the line
    through `before` and `last`; `before` = `last` continues the value. Infinite where these are not in order."""
    steps = len(sigmas)
    lengths = -np.diff([*sigmas, 0.0])
    costs = np.full((steps, steps, steps + 1), np.inf)
    for last in range(steps):
        for before in range(last) if last else (0,):
            total = 0.0
            costs[before, last, last + 1] = 0.0
            for step in range(last + 1, steps):
                slope = 0.0 if before == last else (sigmas[step] - sigmas[last]) / (sigmas[last] - sigmas[before])
                line = np.zeros(steps)
                line[step] = 1.0
                line[last] -= 1 + slope
                line[before] += slope
                total += lengths[step] * float(np.sqrt(max(0.0, felt[step] * (line @ products @ line))))
                costs[before, last, step + 1] = total
    return costs
