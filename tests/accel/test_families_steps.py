"""From step to step and from run to run, in every model family: shapes, callbacks, caches and regions."""

import inspect

import pytest
import torch

from families import PIPELINES, WITHOUT, Family
from masked_reference import FACTS, SPARSE, check_sparse, transformers
from pointillist import accelerate
from pointillist.accel.models import family_of


def test_two_shapes_in_a_row_and_callbacks(family):
    first, second = FACTS[family.name].shapes
    alone = []
    for size in (first, second):
        with accelerate(family.pipe, SPARSE):
            alone.append(family.run(size, steps=2))
    with accelerate(family.pipe, SPARSE):
        for size in (0, 1, 0):
            assert torch.equal(family.run((first, second)[size], steps=2), alone[size])
    if "callback_on_step_end" in inspect.signature(family.pipe.__call__).parameters:
        seen = []

        def halve(pipe, step, timestep, given):
            seen.append(step)
            return {"latents": given["latents"] / 2}

        changed = check_sparse(family, first, callback_on_step_end=halve)
        assert seen == [0, 1] * 2 and not torch.allclose(changed, alone[0])


@pytest.mark.parametrize("name", [*PIPELINES, *WITHOUT])
def test_steps_are_cached(name):
    family = Family(name)
    dense = family.run(steps=8)
    with accelerate(family.pipe, "none", cache="rate:threshold=1000,first=0.3,most=2") as handle:
        assert not torch.equal(family.run(steps=8), dense)
        assert handle.report().steps["cached"] >= 2
    assert torch.equal(family.run(steps=8), dense)


def test_regions(family):
    if not all(family_of(each).can_take_rows for each in transformers(family)):
        pytest.skip("whole steps only")
    dense = family.run(steps=8)
    for plan in ("none", SPARSE):
        with accelerate(family.pipe, plan, regions="easy") as handle:
            found, report = family.run(steps=8), handle.report()
        if any("reference images" in note for note in report.fallbacks):
            assert plan is SPARSE or torch.equal(found, dense)
        else:
            assert not torch.equal(found, dense) and report.steps["region"] >= 2
    assert torch.equal(family.run(steps=8), dense)
    if any("reference images" in note for note in report.fallbacks):
        pytest.skip("whole steps only")
