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


@pytest.mark.parametrize("every", [0, 2, 3, 4, 6, 9])
def test_steps_are_those_of_the_schedule(every):
    steps = timeline(STUDY, every)
    sigmas = tuple(np.linspace(1, 0.05, 20))
    kinds = [Schedule(dense_steps=3, dense_every=every).kind(step, sigmas) for step in range(20)]
    assert steps.dense == kinds.count("dense") and steps.sparse.sum() == kinds.count("sparse")
    assert steps.sparse.tolist() == [kinds[a:b].count("sparse") for a, b in ((3, 9), (9, 14), (14, 20))]
    pairs = list(pairwise(kinds))
    assert steps.learning.max() == pairs.count(("dense", "sparse"))


def test_errors_that_grow_with_age_are_predicted_as_their_mean():
    """An error that equals its age, recorded at two of them, is found at all."""
    for every in periods(STUDY):
        steps = timeline(STUDY, every)
        recorded = np.array([[3, 3], [9, 6], [14, 5]])  # ages at the buckets' middles 5, 11 and 16
        found = (steps.ages * recorded).sum(1)  # an error that equals its age
        last, ages = 2, [[], [], []]
        for step in range(3, 20):
            if every and (step - 3 + 1) % every == 0:
                last = step
            else:
                ages[0 if step < 9 else 1 if step < 14 else 2].append(step - last)
        expected = [np.mean(np.minimum(each, 14 if i == 2 else 99)) for i, each in enumerate(ages)]
        if every == 0:  # older than what was recorded last: held, not extended
            expected[1] = np.mean(np.minimum(ages[1], 9))
        assert found == pytest.approx(expected)
