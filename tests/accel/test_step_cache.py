"""Step caching in real, tiny pipelines of three families, against Diffusers' own caches and definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)

from families import Family
from pointillist import AccelerateError, Plan, PlanError, accelerate
from pointillist.accel import memory
from pointillist.accel.plan import Schedule
from pointillist.accel.step_cache.magnitude import at_steps, shipped_curves
from pointillist.accel.step_cache.policy import Caching, CachingError
from pointillist.accel.step_cache.predictors import PREDICTORS, exponential, polynomial
from pointillist.accel.step_cache.table import CacheTable

FAMILIES = ("wan", "flux", "ltx")
NEVER = ("easy:threshold=0", "first_block:threshold=0", "rate:threshold=0,level=output,predictor=taylor")
ALWAYS = "rate:threshold=1000,first=0.3,most=2"


@pytest.fixture(params=FAMILIES)
def family(request):
    return Family(request.param)


@pytest.mark.parametrize("cache", NEVER)
@pytest.mark.parametrize(("batch", "guidance"), [(1, 3.0), (2, 3.0), (2, 1.0)])
def test_a_threshold_of_zero_changes_nothing(family, cache, batch, guidance):
    dense = [family.run(size, batch=batch, guidance=guidance) for size in (64, 96)]
    with accelerate(family.pipe, "none", cache=cache) as handle:
        found = [family.run(size, batch=batch, guidance=guidance) for size in (64, 96)]
        report = handle.report()
    assert all(torch.equal(a, b) for a, b in zip(dense, found, strict=True))
    assert report.steps["cached"] == 0 and "no step was reused" in "".join(report.fallbacks)


@pytest.mark.parametrize("level", ["stack", "output"])
def test_it_reuses_and_leaves_no_trace(family, level):
    dense, names = family.run(), [name for name, _ in family.pipe.transformer.named_modules()]
    lists = dict(family.pipe.transformer._modules)
    with accelerate(family.pipe, "none", cache=f"{ALWAYS},level={level}") as handle:
        first, second = family.run(), family.run()
        report = handle.report()
        assert [name for name, _ in family.pipe.transformer.named_modules()] == names
    assert torch.equal(first, second) and not torch.equal(first, dense)
    assert report.kinds == ("dense",) * 3 + ("cached", "cached", "dense", "cached", "dense")
    assert report.skipped == 3 / 8 and report.held["step cache"] > 0 and "38% of the steps reused" in str(report)
    assert dict(family.pipe.transformer._modules) == lists and torch.equal(family.run(), dense)


def test_a_reused_step_is_the_definition(family):
    """Latents of a loop that is written out: what the whole model gave is reused."""
    outs, steps = {}, []

    def keep(name, branch, step, compute):
        steps.append(step)
        if step in (2, 3) and len(outs) and (branch, 1) in outs:
            x, out = outs[branch, 1]
            now = seen["x"]
            return type(out)(now + (out[0] - x)) if not isinstance(out, tuple) else (now + (out[0] - x),)
        outs[branch, step] = (seen["x"], compute())
        return outs[branch, step][1]

    seen = {}
    hook = family.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    with accelerate(family.pipe, "none") as handle:
        handle.intercept(keep)
        expected = family.run(steps=5)
    hook.remove()
    plan = replace(Plan.uniform("dense", 1.0), schedule=Schedule(computed=shares(family, 5, [0, 1, 4])))
    if family.name == "wan":
        with accelerate(family.pipe, plan, cache=Caching("schedule", level="output")) as handle:
            found = family.run(steps=5)
            assert handle.report().kinds == ("dense", "dense", "cached", "cached", "dense")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        return
    with accelerate(family.pipe, "none", cache="rate:threshold=1000,first=0.4,most=2,level=output") as handle:
        family.run(steps=5)  # the rate is known after two computed steps, so the third is the first reused one
        assert handle.report().kinds == ("dense", "dense", "cached", "cached", "dense")
        torch.testing.assert_close(family.run(steps=5), expected, atol=1e-5, rtol=1e-4)


def shares(family, steps, chosen):
    with accelerate(family.pipe, "none") as handle:
        family.run(steps=steps)
        sigmas = handle.sigmas
    return tuple(sigmas[step] / sigmas[0] for step in chosen)


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.4])
def test_first_block_is_that_of_diffusers(family, threshold):
    transformer, guidance = family.pipe.transformer, 1.0 if family.name == "ltx" else 3.0  # there guidance is a batch
    transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    theirs = family.run(guidance=guidance)
    transformer.disable_cache()
    caching = Caching("first_block", (("threshold", threshold),), first=0, last=0, most=99)
    with accelerate(family.pipe, "none", cache=caching):
        torch.testing.assert_close(family.run(guidance=guidance), theirs, atol=1e-5, rtol=1e-4)


def test_magnitude_is_that_of_diffusers(family):
    curve = [1.0, 1.02, 0.99, 0.97, 1.01, 0.98, 0.96, 0.95]
    transformer = family.pipe.transformer
    transformer.enable_cache(
        MagCacheConfig(threshold=0.061, max_skip_steps=2, retention_ratio=0.25, num_inference_steps=8, mag_ratios=curve)
    )
    theirs = family.run()
    transformer.disable_cache()
    caching = Caching("magnitude", (("curve", tuple(curve)), ("threshold", 0.061)), first=0.25, last=0, most=2)
    with accelerate(family.pipe, "none", cache=caching) as handle:
        torch.testing.assert_close(family.run(), theirs, atol=1e-5, rtol=1e-4)
        assert handle.report().steps["cached"] >= 2


def evenly(name: str) -> Family:
    """Sigmas that are evenly spaced, so that a line over them is a line over step numbers."""
    family = Family(name)
    family.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return family


@pytest.mark.parametrize("order", [0, 1])
def test_sea_cache_reuses_what_ours_does(order):
    """Its distance is its own; where it may reuse, what stands in is the same: the last residual, or a line."""
    family = evenly("wan")
    transformer, predictor = family.pipe.transformer, ("last", "taylor")[order]
    transformer.enable_cache(
        SeaCacheConfig(
            threshold=1e6, residual_order=order, retention_steps=2, cache_end_steps=1, max_consecutive_cached=2
        )
    )
    theirs = family.run(steps=9)
    transformer.disable_cache()
    caching = Caching("magnitude", (("curve", (1.0,)),), predictor, first=2 / 9, last=1, most=2)
    with accelerate(family.pipe, "none", cache=caching) as handle:
        found = family.run(steps=9)
        assert [kind == "cached" for kind in handle.report().kinds] == [0, 0, 1, 1, 0, 1, 1, 0, 0]
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(theirs, family.run(steps=9), atol=1e-3)


def test_tokens_of_a_batch_are_computed_if_one_entry_needs_it(family):
    """Distances are those of the entry where they are greatest, so a copy in the batch changes nothing."""
    with accelerate(family.pipe, "none", cache="rate:threshold=0.3,first=0.3") as handle:
        family.run(batch=1)
        alone = handle.report().kinds
        family.run(batch=2)
        both = handle.report().kinds
    assert all(one == "cached" or two != "cached" for one, two in zip(alone, both, strict=True))


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_predictors_are_exact_where_they_should_be(predictor):
    points = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    shape, there = torch.randn(3, 2, 4, dtype=torch.float64), 0.35
    curves = {
        "last": lambda t: shape[0],
        "taylor": lambda t: shape[0] + shape[1] * t,
        "parabola": lambda t: shape[0] + shape[1] * t + shape[2] * t * t,
        "exponential": lambda t: shape[0] * 0.3**t + shape[1] * 0.8**t + shape[2] * 1.1**t,
    }
    kept, predict = PREDICTORS[predictor]
    history = [(at, curves[predictor](at)) for at in points][-kept:]
    torch.testing.assert_close(predict(history, there), curves[predictor](there), atol=1e-6, rtol=1e-6)


def test_predictors_make_do_with_less():
    residual = torch.randn(2, 3)
    for _, predict in PREDICTORS.values():
        assert torch.equal(predict([(1.0, residual)], 0.5), residual)
    uneven = [(at, residual * at) for at in (1.0, 0.99, 0.7, 0.65, 0.3)]
    assert torch.equal(exponential(uneven, 0.2), polynomial(2)(uneven, 0.2))
    swinging = [(1 - 0.1 * i, torch.full((2,), float("inf")) if i == 0 else torch.randn(2)) for i in range(5)]
    assert torch.isfinite(exponential(swinging[1:], 0.4)).all()


def test_curves_carry_to_other_step_counts():
    assert at_steps((1.0, 2.0, 3.0), 3) == (1.0, 2.0, 3.0)
    assert at_steps((1.0, 2.0, 3.0), 5) == (1.0, 1.0, 2.0, 3.0, 3.0)
    assert at_steps((1.0, 2.0, 3.0), 1) == (1.0,)
    assert shipped_curves()["wan2.2-t2v-a14b"][0][26] == 0.6552  # where the expert changes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quick", "'quick' is unknown; allowed are auto, none, easy, table, rate"),
        ("rate:threshold", "must be NAME=VALUE"),
        ("rate:threshold=-1", "threshold is -1; it must be a number, 0 or more"),
        ("rate:limit=1", "rate has no option limit; it has threshold"),
        ("rate:predictor=magic", "predictor 'magic' is unknown; allowed are last, taylor"),
        ("rate:first=2", "first is 2; it must be a share"),
        ("rate:most=x", "most is 'x'; it must be a whole number"),
        ("first_block:blocks=0", "blocks is 0"),
        ("first_block:level=output", "the level cannot be output"),
        ("magnitude", "a curve is needed; shipped are flux.1-dev"),
        ("magnitude:curve=sd", "curve 'sd' is not shipped"),
        ("modulated:polynomial=sd", "polynomial 'sd' is not shipped"),
    ],
)
def test_what_is_not_a_policy_is_refused(text, message):
    with pytest.raises(CachingError, match=message):
        Caching.parse(text)


def test_a_plan_holds_its_cache(tmp_path):
    plan = replace(
        Plan.uniform("pooled", 0.3), cache=Caching.parse("modulated:threshold=0.2,predictor=taylor,first=0.1")
    )
    curved = replace(plan, cache=Caching("magnitude", (("curve", (1.0, 0.9)),)))
    scheduled = replace(plan, cache=None, schedule=Schedule(computed=(1.0, 0.5)))
    for each in (plan, curved, scheduled):
        each.save(tmp_path / "plan.safetensors")
        assert Plan.load(tmp_path / "plan.safetensors") == each == Plan.from_json(each.to_json())
    with pytest.raises(PlanError, match="take one away"):
        replace(plan, schedule=Schedule(computed=(1.0, 0.5)))
    with pytest.raises(PlanError, match="must hold numbers from 0 to 1"):
        replace(scheduled, schedule=Schedule(computed=(2.0,)))
    with pytest.raises(PlanError, match="'quick' is unknown"):
        Plan.from_json(plan.to_json().replace('"modulated"', '"quick"'))


def test_schedules_carry_to_more_steps():
    few = tuple(1 - i / 10 for i in range(10))
    many = tuple(1 - i / 40 for i in range(40))
    schedule = Schedule(dense_steps=1, computed=(1.0, 0.7, 0.4, 0.1))
    for sigmas in (few, many):
        kinds = [schedule.kind(step, sigmas) for step in range(len(sigmas))]
        computed = [sigmas[step] for step, kind in enumerate(kinds) if kind != "cached"]
        assert computed == pytest.approx([1.0, 0.7, 0.4, 0.1]) and kinds[0] == "dense" and kinds.count("sparse") == 3


def test_the_modulation_decides_alike_for_every_prompt(run):
    family = Family("wan")
    with accelerate(family.pipe, "none", cache="modulated:threshold=1000,first=0.1") as handle:
        family.run(seed=1)
        first = handle.report()
        family._texts = torch.randn(2, 1, 12, 32)
        family.run(seed=2)
        assert handle.report().kinds == first.kinds and first.steps["cached"] > 0
        assert handle.report().distances == first.distances
    other = Family("flux")
    with accelerate(other.pipe, "none", cache="modulated"), pytest.raises(ValueError, match="another decider"):
        other.run()


def test_attention_becoming_sparse_is_no_change_of_the_clip():
    """The first sparse step is computed, whatever a distance says; a schedule that is searched knows better."""
    family = Family("wan")
    plan = replace(Plan.uniform("pooled", 0.4, block=16), schedule=Schedule(dense_steps=3))
    with accelerate(family.pipe, plan, cache="rate:threshold=1000,first=0.1,most=2") as handle:
        family.run()
        assert handle.report().kinds == ("dense", "dense", "cached", "sparse", "cached", "cached", "sparse", "sparse")


def test_what_it_holds_is_what_was_said():
    """Residuals of the hidden states for each branch, the latents that the rate looks at, and the outputs."""
    family = Family("wan")
    with accelerate(family.pipe, "none", cache="rate:threshold=1000,predictor=parabola") as handle:
        family.run(batch=2)
        report = handle.report()
    tokens, latents = 48, 2 * 16 * 3 * 8 * 8 * 4
    residuals = 2 * 3 * (2 * tokens * 32 * 4)  # branches × kept × [B, N, C]
    assert report.predicted["step cache"] == residuals + (2 + 2) * latents
    assert report.held["step cache"] == pytest.approx(report.predicted["step cache"], rel=1e-3)


@pytest.mark.parametrize(
    "cache",
    [
        f"{ALWAYS},predictor=taylor", f"{ALWAYS},level=output", "first_block:threshold=0.1,predictor=exponential",
        "magnitude", "modulated:threshold=1000,first=0.3,predictor=taylor",
    ],
)  # fmt: skip
@pytest.mark.parametrize(("batch", "guidance"), [(1, 1.0), (2, 3.0)])
def test_what_it_holds_is_predicted(family, cache, batch, guidance):
    """When the first residuals are there, within 5 % of what was held at most."""
    if cache == "magnitude":
        cache = Caching("magnitude", (("curve", (1.0,) * 8),))
    elif family.name != "wan" and str(cache).startswith("modulated"):
        return
    with accelerate(family.pipe, "none", cache=cache) as handle:
        family.run(steps=12, batch=batch, guidance=guidance)
        report = handle.report()
    assert report.held["step cache"] == pytest.approx(report.predicted["step cache"], rel=0.05)


def test_what_cannot_fit_is_refused(family, monkeypatch):
    dense = family.run()
    for cache, way in (
        (f"{ALWAYS},predictor=parabola", "predictor=last needs"),
        (f"{ALWAYS},predictor=taylor", "level=output needs"),
    ):
        with accelerate(family.pipe, "none", cache=cache) as handle:
            monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
            with pytest.raises(MemoryError, match=r"takes 0\.\d MiB, but cpu has 0\.0 MiB free; .*" + way):
                family.run()
            monkeypatch.undo()
            family.run()
            assert handle.report().held["step cache"] > 100
    assert torch.equal(family.run(), dense)


THEIRS = {
    "first block": FirstBlockCacheConfig(),
    "magnitude": MagCacheConfig(num_inference_steps=8, mag_ratios=[1.0] * 8),
    "Taylor": TaylorSeerCacheConfig(),
    "Taylor, lite": TaylorSeerCacheConfig(use_lite_mode=True),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "faster": FasterCacheConfig(current_timestep_callback=lambda: 500, is_guidance_distilled=True),
    "sea": SeaCacheConfig(),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_cache_of_diffusers_is_refused_before_anything_is_changed(name):
    """Whatever of ours is asked for: a cache, a table, regions, or sparse attention."""
    family = Family("wan")
    transformer = family.pipe.transformer
    transformer.enable_cache(THEIRS[name])
    before = [(set(vars(module)), len(module._forward_hooks)) for module in transformer.modules()]
    methods = {name: vars(family.pipe.scheduler).get(name) for name in ("set_timesteps", "step")}
    for wish in (
        dict(plan="none", cache="easy"), dict(plan="none", cache=CacheTable.every(8, 2, 2)),
        dict(plan="none", regions="easy"), dict(plan=Plan.uniform("pooled", 0.3)), dict(plan="none"),
    ):  # fmt: skip
        with pytest.raises(AccelerateError, match=r"has a Diffusers cache \(.*\); call disable_cache\(\) on it"):
            accelerate(family.pipe, **wish)
    assert [(set(vars(module)), len(module._forward_hooks)) for module in transformer.modules()] == before
    assert {name: vars(family.pipe.scheduler).get(name) for name in methods} == methods
    transformer.disable_cache()
    with accelerate(family.pipe, "none", cache="easy") as handle:
        family.run()
        assert len(handle.report().kinds) == 8


def test_unknown_models_are_cached_but_not_sparse():
    family = Family("cogview4")
    with pytest.raises(AccelerateError, match="plan='none', cache='easy'"):
        accelerate(family.pipe)
    family.pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(AccelerateError, match="disable_cache"):
        accelerate(family.pipe, "none", cache="easy")
    family.pipe.transformer.disable_cache()
    with accelerate(family.pipe, "none", cache="easy") as handle:
        family.run()
        assert len(handle.report().kinds) == 8
