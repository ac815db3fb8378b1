"""Stages of a plan: tables of their own for late steps, each with what its patterns learned at the last dense step."""

from dataclasses import replace

import torch

from pointillist import Plan, accelerate
from pointillist.accel.plan import Rule, Stage
from pointillist.accel.schedule import Schedule

EARLY, LATE = Rule("masses", 0.6), Rule("masses", 0.3)
PLAN = Plan(
    "staged", ((EARLY,),), (Stage(((LATE,),), below=0.6),), tail="pooled", residual=True,
    schedule=Schedule(dense_steps=1), block=16, break_even=False,
)  # fmt: skip


def steps_and_densities(handle):
    calls = handle._runtime.record.calls
    return {call.step: None if call.density is None else round(float(call.density), 1) for call in calls}


def test_the_table_changes_where_sigma_falls_below(pipe, run):
    with accelerate(pipe, PLAN) as handle:
        run(pipe, steps=4)
        found = steps_and_densities(handle)
        sigmas = handle._runtime.state.sigmas
    below = [sigma <= 0.6 * sigmas[0] for sigma in sigmas]
    assert below == [False, False, False, True]
    assert found == {0: None, 1: 0.6, 2: 0.6, 3: 0.3}


def test_every_stage_remembers_the_dense_step(pipe, run):
    with accelerate(pipe, PLAN) as handle:
        run(pipe, steps=4)
        assert handle.report().fallbacks == []


def test_a_stage_runs_as_a_plan_of_its_own_would(pipe, run):
    """And it finds what it would lose itself at the dense step, although the early table has no sparse head."""
    alone = replace(PLAN, table=((LATE,),), stages=())
    dense_until_late = replace(PLAN, table=((Rule("dense", 1.0),),))
    with accelerate(pipe, alone):
        expected = run(pipe, steps=4)
    with accelerate(pipe, replace(PLAN, table=((LATE,),), stages=(Stage(((LATE,),), 0.6),))):
        assert torch.equal(run(pipe, steps=4), expected)
    with accelerate(pipe, dense_until_late) as handle:
        run(pipe, steps=4)
        assert steps_and_densities(handle) == {0: None, 1: None, 2: None, 3: 0.3}
        assert handle.report().fallbacks == []
