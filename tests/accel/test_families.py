"""Every model family in a tiny pipeline: exact where it must be, and elsewhere equal to an independent reference."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from peft import LoraConfig

from families import PIPELINES, WITHOUT, Family, run_case
from jobs import run_job
from masked_reference import FACTS, SPARSE, check_sparse, self_attentions, transformers
from pointillist import AccelerateError, Plan, accelerate
from pointillist.accel.models import FAMILIES, family_of

DYNAMIC = replace(Plan.uniform("pooled", 0.4, tail="pooled", dense_steps=1, block=16), residual=True)


@pytest.fixture(params=PIPELINES)
def family(request):
    return Family(request.param)


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


def test_dynamic_patterns_run_everywhere(family):
    """With a tail, and the residual of a dense step."""
    dense = family.run(steps=4)
    with accelerate(family.pipe, DYNAMIC) as handle:
        assert not torch.allclose(family.run(steps=4), dense)
        report = handle.report()
    assert report.steps["dense"] == 1 and report.steps["sparse"] == 3 and report.density < 0.6
    if len(transformers(family)) == 1:  # an expert that takes over has had no dense step
        assert not report.fallbacks


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


def group_offload(family: Family) -> None:
    cpu = torch.device("cpu")
    for each in transformers(family):
        each.enable_group_offload(onload_device=cpu, offload_device=cpu, num_blocks_per_group=1)


def leaf_offload(family: Family) -> None:
    cpu = torch.device("cpu")
    for each in transformers(family):
        each.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def model_offload(family: Family) -> None:
    family.pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("offload", [group_offload, pytest.param(leaf_offload, marks=pytest.mark.slow), model_offload])
def test_offloading(family, offload):
    dense = family.run(steps=2)
    offload(family)
    assert torch.equal(family.run(steps=2), dense)
    check_sparse(family)
    assert torch.equal(family.run(steps=2), dense)


@pytest.mark.parametrize("fused", [False, True])
def test_lora(family, fused):
    if not hasattr(family.pipe.transformer, "add_adapter"):
        pytest.skip("Diffusers loads no LoRA into it")
    dense = family.run(steps=2)
    for each in transformers(family):
        each.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
        with torch.no_grad():
            for name, weight in each.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.2)
        if fused:
            each.fuse_lora()
    adapted = family.run(steps=2)
    assert not torch.allclose(adapted, dense)
    check_sparse(family)
    assert torch.equal(family.run(steps=2), adapted)


def test_layerwise_casting(family):
    for each in transformers(family):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense = family.run(steps=2)
    check_sparse(family)
    assert torch.equal(family.run(steps=2), dense)


def test_save_and_load_after_restoring(family, tmp_path):
    with accelerate(family.pipe, SPARSE):
        family.run(steps=2)
    expected = family.run(steps=2)
    for name in ("transformer", "transformer_2"):
        if getattr(family.pipe, name, None) is not None:
            getattr(family.pipe, name).save_pretrained(tmp_path / name)
            kind = type(getattr(family.pipe, name))
            family.pipe.register_modules(**{name: kind.from_pretrained(tmp_path / name)})
    torch.testing.assert_close(family.run(steps=2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [
    name if name in ("wan", "flux", "sd3", "cosmos") else pytest.param(name, marks=pytest.mark.slow)
    for name in PIPELINES
])  # fmt: skip
def test_compiled(name):
    """One graph for each kind of block, and none more in later steps."""
    family = Family(name)
    with accelerate(family.pipe, SPARSE):
        eager = family.run(steps=2)
    torch._dynamo.reset()
    if family.name in EAGER_ONLY:
        pytest.skip(EAGER_ONLY[family.name])
    with accelerate(family.pipe, SPARSE):
        for each in transformers(family):
            compile_blocks(each)
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(family.run(steps=2), eager, atol=1e-4, rtol=1e-4)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        family.run(steps=4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
        assert not torch._dynamo.utils.counters["graph_break"]


EAGER_ONLY = {"hidream": "eager only: its experts are chosen on the host"}


def compile_blocks(transformer: Any) -> None:
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        for block in {block for block, _ in family_of(transformer).sites(transformer)}:
            block.compile(fullgraph=True, backend="eager")


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


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    return run_job(2, "families", list(PIPELINES), tmp_path_factory.mktemp("two"), seconds=280)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_context_parallel(of_two_processes, name):
    found = of_two_processes[name]
    if isinstance(found, str) and "it is not known how" in found:
        pytest.skip("no")
    assert not isinstance(found, str), found
    torch.testing.assert_close(found, run_case(name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_sparse_attention_says_why(name):
    why = {"sana": "linear already", "cogview4": "docs/models.md"}[name]
    with pytest.raises(AccelerateError, match=why):
        accelerate(Family(name).pipe)
