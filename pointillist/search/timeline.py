"""Which steps are dense under a schedule, and how old is what the sparse ones know of them.

What a sparse call loses changes slowly, so the residual of a dense step helps the more the younger it is: its squared
error grows about linearly with age. Errors are recorded at two ages for each bucket; between them, and from none at age
0, they are interpolated.
"""

from dataclasses import dataclass
from itertools import pairwise

from pointillist.accel.schedule import Schedule
from pointillist.search.study import Study

REFRESHES = 6
"""At most so many dense steps are placed among the sparse ones."""


@dataclass(frozen=True)
class SparseStep:
    """A step that is not dense."""

    bucket: int
    since: int
    """The last dense step before it."""
    calibrated: float
    """What part of the errors that were recorded with the residual of the calibration step is in its own."""
    recent: float
    """Likewise, of those with the residual of the last step that was looked at."""


@dataclass(frozen=True)
class Timeline:
    """A schedule of a study's steps."""

    every: int
    """See `Schedule.dense_every`."""
    dense: int
    """How many steps are dense."""
    sparse: tuple[SparseStep, ...]

    def calls(self, buckets: tuple[int, ...]) -> int:
        """How many sparse steps there are in some buckets."""
        return sum(step.bucket in buckets for step in self.sparse)

    def learning(self, buckets: tuple[int, ...]) -> int:
        """How many dense steps are learnt from for the sparse ones of these buckets, or of buckets before them."""
        return len({step.since for step in self.sparse if step.bucket <= max(buckets)})


def periods(study: Study) -> tuple[int, ...]:
    """Values of `dense_every` worth a try: none, and those that place 1, 2, … dense steps evenly."""
    steps = study.steps - study.dense_steps
    most = min(REFRESHES, steps - 1)
    return tuple(dict.fromkeys([0, *(-(-(steps + 1) // (more + 1)) for more in range(1, most + 1))]))


def timeline(study: Study, every: int) -> Timeline:
    """Of the study's dense steps and every n-th of the others."""
    schedule = Schedule(dense_steps=study.dense_steps, dense_every=every)
    falling = tuple(float(study.steps - step) for step in range(study.steps))
    kinds = [schedule.kind(step, falling) for step in range(study.steps)]
    sparse, before = [], study.calibration_step
    for bucket, (middle, (first, stop)) in enumerate(zip(study.bucket_steps, pairwise(study.edges), strict=True)):
        for step in range(first, stop):
            if kinds[step] == "sparse":
                since = max(each for each in range(step) if kinds[each] == "dense")
                parts = _parts(step - since, middle - before, middle - study.calibration_step)
                sparse.append(SparseStep(bucket, since, *parts))
        before = middle
    return Timeline(every, kinds.count("dense"), tuple(sparse))


def _parts(age: int, recent: int, calibrated: int) -> tuple[float, float]:
    """What an error at some age has of those recorded at two: since calibration, and since the step before."""
    if age <= recent or recent == calibrated:
        return 0.0, age / recent
    late = min(1.0, (age - recent) / (calibrated - recent))
    return late, 1 - late
