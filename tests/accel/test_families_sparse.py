"""Every model family in a tiny pipeline: exact where it must be, and elsewhere equal to an independent reference."""

import pytest
import torch

from families import PIPELINES, WITHOUT, Family
from masked_reference import FACTS, SPARSE, check_sparse, self_attentions, transformers
from pointillist import AccelerateError, Plan, accelerate
from pointillist.accel.models import FAMILIES, family_of


def test_every_family_is_tried():
    assert set(FACTS) == set(PIPELINES)
    assert {type(family_of(Family(name).pipe.transformer)) for name in PIPELINES} == {type(each) for each in FAMILIES}


def test_the_sites_are_all_self_attentions(family):
    for transformer in transformers(family):
        found = family_of(transformer).site_names(transformer)
        assert set(found) == set(self_attentions(family.name, transformer)) and len(set(found)) == len(found)


def test_density_one_and_restoring_are_exact(family):
    """With two prompts, guided and not."""
    family.run(steps=2)
    modules = [module for each in transformers(family) for module in each.modules()]
    traces = [set(vars(module)) for module in (*modules, family.pipe.scheduler)]
    for guidance in (3.0, 1.0):
        call = dict(steps=2, batch=FACTS[family.name].batch, guidance=guidance)
        dense = family.run(**call)
        for plan in ("none", Plan.uniform("pooled", 1.0, block=16)):
            with accelerate(family.pipe, plan) as handle:
                assert torch.equal(family.run(**call), dense)
                assert handle.report().density_overall == 1.0 and not handle.report().fallbacks
        with accelerate(family.pipe, SPARSE):
            assert not torch.equal(family.run(**call), dense)
        assert torch.equal(family.run(**call), dense)
    assert [set(vars(module)) for module in (*modules, family.pipe.scheduler)] == traces
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


def test_sparse_output_equals_a_masked_reference(family):
    """Text, reference images and padding are exact in it: all of their rows and columns are computed."""
    first, second = FACTS[family.name].shapes
    check_sparse(family, first, batch=1, guidance=1.0)
    check_sparse(family, second, batch=FACTS[family.name].batch, guidance=3.0)


@pytest.mark.parametrize("name", [name for name, facts in FACTS.items() if facts.ragged])
def test_prompts_of_unequal_length(name):
    """Padding is never seen, and what is no padding always."""
    family, call = Family(name), dict(batch=2, lengths=[5, 12], negative_lengths=[12, 9])
    sparse = check_sparse(family, 64, **call)
    with accelerate(family.pipe, SPARSE):
        assert not torch.allclose(family.run(steps=2, batch=2, lengths=[6, 12], negative_lengths=[12, 9]), sparse)
    if FACTS[name].masks:
        poisoned = check_sparse(family, 64, padding=30.0, **call)
        torch.testing.assert_close(poisoned, sparse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_sparse_attention_says_why(name):
    why = {"sana": "linear already", "cogview4": "docs/models.md"}[name]
    with pytest.raises(AccelerateError, match=why):
        accelerate(Family(name).pipe)
