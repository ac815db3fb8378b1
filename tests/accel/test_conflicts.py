"""Every rule of what does not go together: it applies where it should, names what was given, and changes nothing."""

from dataclasses import replace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

from conftest import make_pipe, make_transformer
from families import Family
from pointillist import AccelerateError, Plan, accelerate
from pointillist.accel.conflicts import CONFLICTS, inert
from pointillist.accel.step_cache.calibration import MadeWith
from pointillist.accel.step_cache.policy import Caching
from pointillist.accel.step_cache.table import CacheTable


def noisy():
    return make_pipe(scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))


def two_evaluations():
    return make_pipe(scheduler=FlowMatchHeunDiscreteScheduler())


def multistep():
    return make_pipe(scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))


def half_loaded():
    pipe = make_pipe()
    pipe.register_to_config(boundary_ratio=0.9)
    return pipe


def flux():
    return Family("flux").pipe


def split(pipe, **degrees):
    """As `enable_parallelism` leaves a model; rules are checked before any process is asked."""
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(**degrees))
    return pipe


def ring():
    return split(make_pipe(), ring_degree=2, ulysses_degree=1)


def ulysses():
    return split(make_pipe(), ring_degree=1, ulysses_degree=2)


def half_split():
    return split(make_pipe(transformer_2=make_transformer()), ring_degree=1, ulysses_degree=2)


def cosmos():
    return Family("cosmos").pipe


def curve(model=None, plan=None) -> Caching:
    made = MadeWith(model=model, plan=plan).values
    return Caching("magnitude", (("curve", (1.0, 0.99)), ("made_with", made)))


SPARSE = Plan.uniform("pooled", 0.3, block=16)
APPLYING = {
    "regions of an unknown family": (cosmos, dict(plan="none", regions="easy"), "regions are not known for Cosmos"),
    "an order from layer to layer of an unknown family": (
        flux, dict(plan=replace(SPARSE, hoist="frames")), "not known for FluxTransformer2DModel",
    ),
    "a sampler with noise of its own": (noisy, dict(plan="none", regions="easy"), "adds noise of its own"),
    "a sampler with two evaluations in a step": (two_evaluations, dict(plan="none", cache="easy"), "Heun"),
    "a cache and noise of the sampler": (noisy, dict(plan="none", cache="easy"), "reusing them harms"),
    "regions and a sampler of several steps": (multistep, dict(plan="none", regions="easy"), "UniPCMultistepScheduler"),
    "keys made anew beside text": (flux, dict(plan="none", regions="change:keys=input"), "attends to text as well"),
    "a cache table with regions": (
        make_pipe, dict(plan="none", regions="easy", cache=CacheTable.every(steps=4, layers=2, interval=2)),
        "take one away",
    ),
    "a curve of another model": (make_pipe, dict(plan="none", cache=curve("flux-made-up")), "another model: flux-made"),
    "a curve of another attention": (
        make_pipe, dict(plan=SPARSE, cache=curve(plan="none")), "with the attention plan 'none'; here it is 'uniform",
    ),
    "a plan that a ring cannot carry out": (ring, dict(plan=SPARSE), "cannot run in a ring of 2 processes"),
    "regions that make keys anew, over several processes": (
        ulysses, dict(plan="none", regions="change:keys=input"), "each of several processes has a part",
    ),
    "one transformer of two is split": (half_split, dict(plan="none"), "is split over processes and one is not"),
    "one transformer of two is missing": (half_loaded, dict(plan="none"), "only pipe.transformer is there"),
}  # fmt: skip


def test_every_rule_is_tried():
    assert [rule.name for rule in CONFLICTS] == list(APPLYING)
    assert {rule.verdict for rule in CONFLICTS} == {"refuse", "warn"}


@pytest.mark.parametrize("rule", CONFLICTS, ids=lambda rule: rule.name)
def test_a_rule_applies_where_it_should_and_nowhere_else(rule):
    make, wish, sentence = APPLYING[rule.name]
    pipe = make()
    before = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    if rule.verdict == "refuse":
        with pytest.raises(AccelerateError, match=sentence):
            accelerate(pipe, **wish)
    else:
        with accelerate(pipe, **wish) as handle:
            assert any(sentence in note for note in handle.report().fallbacks)
    assert {name: set(vars(module)) for name, module in pipe.transformer.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    plain = dict(plan=SPARSE, cache="easy", regions="easy")
    if rule.name == "a curve of another attention":  # of which dense attention is the cure
        plain = dict(plan="none", cache=wish["cache"])
    with accelerate(make_pipe(), **plain) as handle:
        assert handle.report().fallbacks == []


def test_a_pipeline_with_both_transformers_is_whole():
    pipe = make_pipe(transformer_2=make_transformer())
    pipe.register_to_config(boundary_ratio=0.9)
    with accelerate(pipe, "none", cache="easy") as handle:
        assert handle.report().fallbacks == []


def test_few_steps_leave_nothing_to_reuse(run):
    pipe = make_pipe()
    with accelerate(pipe, "none", cache="rate:threshold=1000") as handle:
        run(pipe, steps=4)
        assert any("cache inert: of 4 steps" in note for note in handle.report().fallbacks)
        run(pipe, steps=12)
        report = handle.report()
        assert report.steps["cached"] > 0 and not any("inert" in note for note in report.fallbacks)


def test_what_a_schedule_reuses_is_never_inert():
    setup = type("Setup", (), {"caching": Caching("schedule")})()
    assert inert(setup, 4) == "" and inert(type("Setup", (), {"caching": None})(), 4) == ""


def test_an_expert_that_takes_over_is_computed_first(run):
    """Two transformers, one for noisy steps: what the first gave never serves the second."""
    torch.manual_seed(torch.seed() % 2**31)
    pipe = make_pipe(transformer_2=make_transformer())
    pipe.register_to_config(boundary_ratio=0.8)
    schedule = replace(Plan.uniform("dense", 1.0).schedule, computed=(1.0,))
    plan = replace(Plan.uniform("dense", 1.0), schedule=schedule)
    with accelerate(pipe, plan) as handle:
        run(pipe, steps=10)
        report, sigmas = handle.report(), handle.sigmas
    computed = [step for step, kind in enumerate(report.kinds) if kind != "cached"]
    assert len(computed) == 2 and computed[0] == 0
    assert sigmas[computed[1]] < 0.8 <= sigmas[computed[1] - 1]
