"""Which steps are dense under a schedule, and how old is what the sparse ones know of them.

What a sparse call loses changes slowly, so the residual of a dense step helps the more the younger it is: how unlike
both losses are grows about linearly with the age. It is recorded at two ages for each bucket; between them, and from
none at age 0, it is interpolated.
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

    step: int
    bucket: int
    since: int
    """The last dense step before it."""
    calibrated: float
    """How unlike its loss is to that of `since`: so much of what was recorded of the calibration step's."""
    recent: float
    """And so much of what was recorded of the last step's that was looked at."""
    stands_for: int = 1
    """Itself, and the steps behind it that reuse what it gave, or, of most tokens, in region steps."""


@dataclass(frozen=True)
class Timeline:
    """A schedule of a study's steps."""

    every: int
    """See `Schedule.dense_every`."""
    dense: int
    """How many steps are dense."""
    computed: int
    """How many are computed, all tokens of them."""
    regions: int
    """In how many a part of the tokens is computed."""
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
    found = [-(-(steps + 1) // (more + 1)) for more in range(1, most + 1)]
    return tuple(dict.fromkeys([0, *(every for every in found if steps % every)]))  # the last step needs no other


def timeline(study: Study, every: int, computed: tuple[int, ...] = (), region_after: tuple[int, ...] = ()) -> Timeline:
    """Of the study's dense steps and every n-th of the others. `computed` names the steps that are; empty: all are.
    Behind those of `region_after` a part of the tokens is computed."""
    shares, after = (tuple((study.steps - step) / study.steps for step in each) for each in (computed, region_after))
    schedule = Schedule(dense_steps=study.dense_steps, dense_every=every, computed=shares, region_after=after)
    falling = tuple(float(study.steps - step) for step in range(study.steps))
    kinds = [schedule.kind(step, falling) for step in range(study.steps)]
    sparse, before = [], study.calibration_step
    for bucket, (middle, (first, stop)) in enumerate(zip(study.bucket_steps, pairwise(study.edges), strict=True)):
        for step in range(first, stop):
            if kinds[step] == "sparse":
                since = max(each for each in range(step) if kinds[each] == "dense")
                parts = _parts(step - since, middle - before, middle - study.calibration_step)
                whole = (i for i, kind in enumerate(kinds[step + 1 :]) if kind in ("dense", "sparse"))
                behind = next(whole, len(kinds) - step - 1)
                sparse.append(SparseStep(step, bucket, since, *parts, stands_for=1 + behind))
        before = middle
    cached, regions = kinds.count("cached"), kinds.count("region")
    return Timeline(every, kinds.count("dense"), len(kinds) - cached - regions, regions, tuple(sparse))


def _parts(age: int, recent: int, calibrated: int) -> tuple[float, float]:
    """Linear in age, through 0 and what was recorded at two ages: since calibration, and since the step before."""
    if age <= recent or recent == calibrated:
        return 0.0, age / recent
    late = min(1.0, (age - recent) / (calibrated - recent))
    return late, 1 - late
