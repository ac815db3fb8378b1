"""Patterns that look at what they attend to, and what is learned of a dense step, in every model family."""

from dataclasses import replace

import pytest
import torch

from families import Family
from masked_reference import transformers
from pointillist import Plan, accelerate

DYNAMIC = replace(Plan.uniform("pooled", 0.4, tail="pooled", dense_steps=1, block=16), residual=True)


def test_dynamic_patterns_run_everywhere(family):
    """With a tail, and the residual of a dense step."""
    dense = family.run(steps=4)
    with accelerate(family.pipe, DYNAMIC) as handle:
        assert not torch.allclose(family.run(steps=4), dense)
        report = handle.report()
    assert report.steps["dense"] == 1 and report.steps["sparse"] == 3 and report.density < 0.6
    if len(transformers(family)) == 1:  # an expert that takes over has had no dense step
        assert not report.fallbacks


@pytest.mark.parametrize("name", ["hunyuan-video", "chroma"])
@pytest.mark.parametrize("plan", [
    Plan.uniform("masses", 0.4, tail="pooled", dense_steps=1, block=16),
    Plan.uniform("pooled", 0.4, tail="rescaled", dense_steps=1, block=16),
], ids=["masses", "rescaled"])  # fmt: skip
def test_what_is_learned_of_a_dense_step_sees_no_padding(name, plan):
    family, call = Family(name), dict(steps=3, batch=2, lengths=[5, 12], negative_lengths=[12, 9])
    with accelerate(family.pipe, plan) as handle:
        torch.testing.assert_close(family.run(padding=30.0, **call), family.run(**call), atol=1e-4, rtol=1e-4)
        assert handle.report().steps["sparse"] == 2 and not handle.report().fallbacks
