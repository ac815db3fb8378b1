"""Which steps are dense, how often is learnt, and how errors grow with the age of what was learnt."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from pointillist.accel.plan import Rule
from pointillist.accel.schedule import Schedule
from pointillist.search.study import Study
from pointillist.search.timeline import periods, timeline

STUDY = Study(
    model="m", layers=1, heads=1, head_dim=8, prompts=("",), call={}, rules=(Rule("dense", 1.0),), tails=("pooled",),
    steps=20, dense_steps=3,
)  # fmt: skip


def test_periods_place_more_and_more_dense_steps():
    assert periods(STUDY) == (0, 9, 6, 5, 4, 3)
    assert [timeline(STUDY, every).dense for every in periods(STUDY)] == [3, 4, 5, 6, 7, 8]
    assert periods(replace(STUDY, steps=2, dense_steps=1)) == (0,)
    assert 7 not in periods(replace(STUDY, steps=50, dense_steps=8))  # its last dense step would be the last of all


@pytest.mark.parametrize("every", [0, 2, 3, 4, 6, 9])
def test_steps_are_those_of_the_schedule(every):
    steps = timeline(STUDY, every)
    sigmas = tuple(np.linspace(1, 0.05, 20))
    kinds = [Schedule(dense_steps=3, dense_every=every).kind(step, sigmas) for step in range(20)]
    assert steps.dense == kinds.count("dense") and steps.calls((0, 1, 2)) == kinds.count("sparse")
    assert [steps.calls((i,)) for i in range(3)] == [kinds[a:b].count("sparse") for a, b in ((3, 9), (9, 14), (14, 20))]
    pairs = list(pairwise(kinds))
    assert steps.learning((2,)) == pairs.count(("dense", "sparse"))
    assert steps.learning((0,)) <= steps.learning((0, 1)) <= steps.learning((1, 2))


def test_errors_that_grow_with_age_are_found_at_any_age():
    """An error that equals its age, recorded at two of them; what is older than both is held, not extended."""
    recorded = ((3, 3), (9, 6), (14, 5))  # ages at the buckets' middles 5, 11 and 16
    for every in periods(STUDY):
        dense = [2] + [step for step in range(3, 20) if every and (step - 3 + 1) % every == 0]
        numbers = [step for step in range(3, 20) if step not in dense]
        for number, step in zip(numbers, timeline(STUDY, every).sparse, strict=True):
            assert step.step == number
            assert step.since == max(each for each in dense if each < number)
            calibrated, recent = recorded[step.bucket]
            found = step.calibrated * calibrated + step.recent * recent
            assert found == pytest.approx(min(number - step.since, 99 if step.bucket == 0 else calibrated))
