"""Which steps are dense under a schedule, and how old is what the sparse ones know of them.

What a sparse call loses changes slowly, so the residual of a dense step helps the more the younger it is: its squared
error grows about linearly with age. Errors are recorded at two ages for each bucket; between them, and from none at age
0, they are interpolated.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pointillist.accel.schedule import Schedule
from pointillist.search.study import Study

REFRESHES = 6
"""At most so many dense steps are placed among the sparse ones."""


@dataclass(frozen=True)
class Timeline:
    """A schedule of a study's steps."""

    every: int
    """See `Schedule.dense_every`."""
    dense: int
    """How many steps are dense."""
    sparse: np.ndarray
    """int64 [buckets]: how many are not."""
    learning: np.ndarray
    """int64 [buckets]: how many dense steps are followed by a sparse one and come before the bucket's last."""
    ages: np.ndarray
    """float64 [buckets, 2]: what part the errors since calibration and since the bucket before have in the mean error
    of the bucket's sparse steps."""


def periods(study: Study) -> tuple[int, ...]:
    """Values of `dense_every` worth a try: none, and those that place 1, 2, … dense steps evenly."""
    steps = study.steps - study.dense_steps
    return tuple(
        dict.fromkeys([0, *(-(-(steps + 1) // (more + 1)) for more in range(1, min(REFRESHES, steps - 1) + 1))])
    )


def timeline(study: Study, every: int) -> Timeline:
    """Of the study's dense steps and every n-th of the others."""
    schedule = Schedule(dense_steps=study.dense_steps, dense_every=every)
    falling = tuple(float(study.steps - step) for step in range(study.steps))
    sparse = [schedule.kind(step, falling) == "sparse" for step in range(study.steps)]
    learning = [step for step in range(study.steps - 1) if not sparse[step] and sparse[step + 1]]
    before, found = study.calibration_step, []
    for middle, (first, stop) in zip(study.bucket_steps, pairwise(study.edges), strict=True):
        mine = [step for step in range(first, stop) if sparse[step]]
        ages = [step - max(each for each in learning if each < step) for step in mine]
        parts = [_parts(age, middle - before, middle - study.calibration_step) for age in ages]
        mean = np.mean(parts, axis=0) if parts else np.zeros(2)
        found.append((len(mine), sum(each < max(mine, default=0) for each in learning), mean))
        before = middle
    counts, learnt, means = zip(*found, strict=True)
    return Timeline(every, sparse.count(False), np.array(counts), np.array(learnt), np.stack(means))


def _parts(age: int, recent: int, calibrated: int) -> tuple[float, float]:
    """What an error at some age takes of those recorded at two: since calibration, and since the bucket before."""
    if age <= recent or recent == calibrated:
        return 0.0, age / recent
    late = min(1.0, (age - recent) / (calibrated - recent))
    return late, 1 - late
