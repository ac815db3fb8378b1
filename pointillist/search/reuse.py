"""Which steps to compute, if others reuse what they gave or compute a part of the tokens: for every number of computed
steps, those with least error.

A reused step's velocity is a straight line through those of the last two computed steps. Of a recorded dense run all
inner products of velocities are known, so the error of any such line is known without running the model. What a region
step loses is known of a run along the dense one, in two parts. Tokens that are not computed hold on to their velocity:
they lose a share of what all would lose by that. Tokens that are computed see keys that are such lines, whose error
changes as the remainder of a line does, with the distances to both steps that it goes through.

Errors of steps point the same way for the most part, so their lengths are added up: each times how far the latents go
in the step and how much the clip feels it. That sum is least along a shortest path over pairs of computed steps (the
idea of LeMiCa's paths, with the predictor taken into account).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

LONGEST = 3
"""So many region steps in a row at most: what a line loses further on was not measured."""
PRICES = (0.01, 0.03, 0.1)
"""What a region step is taken to cost, in the error of the schedule that computes half of the steps: each gives other
schedules."""


@dataclass(frozen=True)
class Reuse:
    """Some steps are computed; the others reuse what they gave, or compute a part of the tokens."""

    computed: tuple[int, ...]
    error: float
    """Predicted mean squared error of the clip."""
    region_after: tuple[int, ...] = ()
    """Behind these computed steps a part of the tokens is computed, up to the next computed one."""


@dataclass(frozen=True)
class Recorded:
    """What is known of a dense run."""

    products: np.ndarray
    """float64 [steps, steps], mean products of the guided velocities of every two steps."""
    sigmas: tuple[float, ...]
    """Of the steps."""
    felt: np.ndarray
    """[steps], mean squared error of the clip for each of the latents, by step."""
    in_regions: np.ndarray | None = None
    """[2, steps]: what region steps lose, as root mean squares of the velocity: by tokens that are not computed, over
    what holding on to the last computed velocity would lose; and by keys, over the product of the distances to the two
    sigmas whose keys a line goes through. None: there are no region steps."""

    @cached_property
    def lost(self) -> np.ndarray:
        """See `_lost`; each price of region steps looks at it."""
        return _lost(self)

    @cached_property
    def lost_in_regions(self) -> np.ndarray:
        """See `_lost_in_regions`."""
        return _lost_in_regions(self)


def schedules(recorded: Recorded) -> tuple[Reuse, ...]:
    """The best schedules of each number of computed steps: without region steps, then with."""
    found = list(best_reuse(recorded).values())
    if recorded.in_regions is None:
        return tuple(found)
    scale = float(np.sqrt(found[len(found) // 2].error))
    for price in PRICES:
        found += [each for each in best_reuse(recorded, price * scale).values() if each.region_after]
    return tuple({(each.computed, each.region_after): each for each in found}.values())


def best_reuse(recorded: Recorded, price: float | None = None) -> dict[int, Reuse]:
    """The best schedule for each number of computed steps, from 2 to all; the first step is always one of them.

    Args:
        price: what each region step adds to the root of the error; None: there are none.
    """
    steps = len(recorded.sigmas)
    lost = recorded.lost
    costs, in_part = lost, np.zeros(lost.shape, dtype=bool)
    if price is not None:
        priced = recorded.lost_in_regions + price * _between(steps)
        in_part = priced < lost
        costs = np.where(in_part, priced, lost)
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
        computed = tuple(reversed(path))
        after = [each for each in _segments(computed, steps) if in_part[each]]
        total = float(ends.min()) - sum((price or 0.0) * (stop - last - 1) for _, last, stop in after)
        found[count] = Reuse(computed, total**2, tuple(last for _, last, _ in after))
    return found


def _segments(computed: tuple[int, ...], steps: int) -> list[tuple[int, int, int]]:
    """Of each computed step: the one before it, itself, and the next."""
    return [
        (before, last, stop)
        for before, (last, stop) in zip((0, *computed[:-1]), pairwise((*computed, steps)), strict=True)
    ]


def _between(steps: int) -> np.ndarray:
    """[1, steps, steps + 1]: how many steps lie between `last` and `next`."""
    last, stop = np.arange(steps)[:, None], np.arange(steps + 1)
    return np.maximum(0, stop - last - 1)[None]


def _lost(recorded: Recorded) -> np.ndarray:
    """[steps, steps, steps + 1]: the root of the clip's error if the steps between `last` and `next` continue the line
    through `before` and `last`; `before` = `last` continues the value. Infinite where these are not in order."""
    sigmas, products = np.array(recorded.sigmas), recorded.products
    steps = len(sigmas)
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
                total += _weight(recorded, step) * float(np.sqrt(max(0.0, line @ products @ line)))
                costs[before, last, step + 1] = total
    return costs


def _lost_in_regions(recorded: Recorded) -> np.ndarray:
    """Likewise, if those steps compute a part of the tokens. Infinite where there are to be none, or more than
    `LONGEST`."""
    assert recorded.in_regions is not None, "what region steps lose was not recorded"
    sigmas, steps = recorded.sigmas, len(recorded.sigmas)
    costs = np.full((steps, steps, steps + 1), np.inf)
    for last in range(1, steps):
        for before in range(last):
            total = 0.0
            for step in range(last + 1, min(last + LONGEST, steps - 1) + 1):
                by_kept, by_keys = recorded.in_regions[:, step]
                by_kept = by_kept * _held(recorded.products, last, step)
                by_keys = by_keys * (sigmas[last] - sigmas[step]) * (sigmas[before] - sigmas[step])
                total += _weight(recorded, step) * float(np.hypot(by_kept, by_keys))
                costs[before, last, step + 1] = total
    return costs


def _held(products: np.ndarray, last: int, step: int) -> float:
    """Root mean square of what the velocity of `last` misses of that of `step`."""
    return float(np.sqrt(max(0.0, products[last, last] - 2 * products[last, step] + products[step, step])))


def _weight(recorded: Recorded, step: int) -> float:
    """What the clip feels of an error of a step's velocity: how far the latents go, times how much that is felt."""
    sigmas = recorded.sigmas
    length = sigmas[step] - (sigmas[step + 1] if step + 1 < len(sigmas) else 0.0)
    return length * float(np.sqrt(recorded.felt[step]))
