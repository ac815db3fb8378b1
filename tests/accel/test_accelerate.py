"""Accelerating a real, tiny Wan pipeline: exactness, restoration, state, refusal."""

import copy
import functools
import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler

from conftest import make_pipe, make_transformer
from pointillist import AccelerateError, Plan, PlanError, accelerate
from pointillist.accel.models.family import Tokens
from pointillist.accel.plan import Rule
from pointillist.accel.run_state import RunState
from pointillist.accel.tiles import frame_tiles_of
from pointillist.kernels import pool_blocks


def test_restore_leaves_no_trace(pipe, run):
    before = run(pipe)
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    attributes = [set(vars(m)) for m in (*pipe.transformer.modules(), pipe.scheduler)]
    with accelerate(pipe, Plan.uniform("pooled", 0.3, block=16)):
        during = run(pipe)
    assert not torch.equal(before, during)
    assert torch.equal(before, run(pipe))
    assert all(block.attn1.processor is p for block, p in zip(pipe.transformer.blocks, processors, strict=True))
    assert [set(vars(m)) for m in (*pipe.transformer.modules(), pipe.scheduler)] == attributes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.transformer.modules())


def test_an_observer_may_replace_what_a_site_gives(pipe, run):
    before, site = run(pipe), "transformer.blocks.1.attn1"

    def halved(name, branch, step, q, k, v, out):
        return out / 2 if (name, branch, step) == (site, "cond", 2) else None

    with accelerate(pipe, "none") as handle:
        handle.observe(halved)
        assert not torch.equal(run(pipe), before)
        handle.observe(lambda *call: call[-1].clone())
        assert torch.equal(run(pipe), before)
    assert torch.equal(run(pipe), before)


def test_an_interceptor_stands_before_every_call_of_a_transformer(pipe, run):
    before, seen, kept = run(pipe), [], {}

    def keep(name, branch, step, compute):
        seen.append((name, branch, step))
        kept[branch, step] = compute()
        return kept[branch, step]

    with accelerate(pipe, "none") as handle:
        handle.intercept(keep)
        assert torch.equal(run(pipe), before)
    assert seen == [("transformer", branch, step) for step in range(4) for branch in ("cond", "uncond")]
    with accelerate(pipe, "none") as handle:
        handle.intercept(lambda name, branch, step, compute: kept[branch, step])  # nothing is computed
        assert torch.equal(run(pipe), before)
        assert not handle.report().attention_seconds
    with accelerate(pipe, "none") as handle:
        handle.intercept(lambda name, branch, step, compute: tuple(x + (step == 3) for x in compute()))
        assert not torch.equal(run(pipe), before)
    assert torch.equal(run(pipe), before) and "forward" not in vars(pipe.transformer)


def test_plan_none_and_density_one_equal_dense(pipe, run):
    dense = run(pipe)
    for plan in ("none", Plan.uniform("pooled", 1.0, block=16), Plan.uniform("dense", 1.0)):
        with accelerate(pipe, plan) as handle:
            assert torch.equal(run(pipe), dense)
            assert handle.report().density is None and handle.report().density_overall == 1.0


def test_a_dense_rule_is_dense_whatever_its_density(pipe, run):
    dense = run(pipe)
    with accelerate(pipe, Plan("mine", ((Rule("dense", 0.3),),))) as handle:
        assert torch.equal(run(pipe), dense) and not handle.report().fallbacks


def masked_attention_processor(block: int, density: float):
    """A processor that computes pooled selection token by token with a mask: an independent second implementation."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Masked(WanAttnProcessor):
        grid = None

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            self.mask_for = None
            original = torch.nn.functional.scaled_dot_product_attention

            def sdpa(query, key, value, **kwargs):
                order, bounds = frame_tiles_of(self.grid, block)
                tiles, inverse = len(bounds) - 1, order.argsort()
                mean_q, _ = pool_blocks(query[:, :, order], bounds)
                mean_k, _ = pool_blocks(key[:, :, order], bounds)
                scores = mean_q @ mean_k.transpose(-1, -2) * query.shape[-1] ** -0.5
                keep = max(1, round(density * tiles))
                kept = torch.zeros_like(scores, dtype=torch.bool)
                for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
                    row = scores[b, h, i].clone()
                    row[i] = torch.inf
                    kept[b, h, i, row.argsort(descending=True)[:keep]] = True
                of_token = torch.repeat_interleave(torch.arange(tiles), bounds.diff().long())[inverse]
                return original(query, key, value, attn_mask=kept[:, :, of_token][:, :, :, of_token])

            torch.nn.functional.scaled_dot_product_attention = sdpa
            try:
                return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            finally:
                torch.nn.functional.scaled_dot_product_attention = original

    return Masked()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sparse_output_equals_a_masked_reference(pipe, run, batch, guidance):
    with accelerate(pipe, Plan.uniform("pooled", 0.4, tail="none", block=16)) as handle:
        sparse = run(pipe, size=128, batch=batch, guidance=guidance)
        assert handle.report().density == pytest.approx(5 / 12)  # 4 tiles in each of 3 frames
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(masked_attention_processor(16, 0.4))
        block.attn1.processor.grid = (3, 8, 8)
    torch.testing.assert_close(sparse, run(pipe, size=128, batch=batch, guidance=guidance), atol=2e-4, rtol=1e-4)


def test_a_plan_may_keep_the_first_frame_dense(pipe, run):
    plan = replace(Plan.uniform("pooled", 0.4, tail="none", block=16), dense_first_frame=True)
    with accelerate(pipe, plan) as handle:
        run(pipe, size=128)
        assert handle.report().density == pytest.approx((4 * 12 + 8 * 5) / 12**2)


def test_two_shapes_in_a_row_and_repetition(pipe, run):
    plan = Plan.uniform("window", 0.3, block=16)
    with accelerate(pipe, plan):
        first = run(pipe, size=64), run(pipe, size=96, frames=5)
        again = run(pipe, size=64), run(pipe, size=96, frames=5)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with accelerate(pipe, plan):
        assert torch.equal(run(pipe, size=96, frames=5), first[1])


def test_dense_steps_and_report(pipe, run):
    with accelerate(pipe, Plan.uniform("pooled", 0.3, dense_steps=2, block=16)) as handle:
        run(pipe, steps=5)
        report = handle.report()
    assert report.steps == {"dense": 2, "sparse": 3, "cached": 0, "region": 0}
    assert report.tokens == 48 and set(report.density_per_site) == {
        "transformer.blocks.0.attn1",
        "transformer.blocks.1.attn1",
    }
    assert report.density_overall == pytest.approx((2 + 3 * report.density) / 5)
    assert 0 < report.attention_seconds < report.denoise_seconds
    assert "3 sparse" in str(report)


def test_an_interrupted_run_leaves_nothing_behind(pipe, run):
    plan = Plan.uniform("pooled", 0.3, dense_steps=1, block=16)
    with accelerate(pipe, plan):
        clean = run(pipe)

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            raise RuntimeError("stopped")
        return kwargs

    with accelerate(pipe, plan) as handle:
        with pytest.raises(RuntimeError, match="stopped"):
            run(pipe, callback_on_step_end=stop)
        assert torch.equal(run(pipe), clean)
        assert sum(handle.report().steps.values()) == 4


def test_two_experts_have_sites_of_their_own(run):
    pipe = make_pipe(transformer_2=make_transformer(), boundary_ratio=0.8)
    dense = run(pipe)
    with accelerate(pipe, Plan.uniform("pooled", 0.3, block=16)) as handle:
        assert not torch.equal(run(pipe), dense)
        sites = handle.report().density_per_site
    assert {name.split(".")[0] for name in sites} == {"transformer", "transformer_2"}
    assert torch.equal(run(pipe), dense)


def test_schedulers_keep_their_signature(pipe):
    before = inspect.signature(pipe.scheduler.step), inspect.signature(pipe.scheduler.set_timesteps)
    with accelerate(pipe, "none"):
        assert (inspect.signature(pipe.scheduler.step), inspect.signature(pipe.scheduler.set_timesteps)) == before


def test_handles_of_one_scheduler_are_restored_in_any_order(run):
    first = make_pipe()
    second = make_pipe(scheduler=first.scheduler)
    run(first)
    untouched = set(vars(first.scheduler))
    a, b = accelerate(first, "none"), accelerate(second, "none")
    a.restore()
    run(second)
    assert b.report().steps["dense"] == 4 and a.report().steps["dense"] == 0
    b.restore()
    assert set(vars(first.scheduler)) == untouched


def test_a_method_that_the_user_has_set_since_survives(pipe, run):
    handle = accelerate(pipe, "none")
    below, calls = pipe.scheduler.step, []

    @functools.wraps(below)
    def mine(*args, **kwargs):
        calls.append(1)
        return below(*args, **kwargs)

    pipe.scheduler.step = mine
    handle.restore()
    run(pipe)
    assert pipe.scheduler.step is mine and len(calls) == 4 and handle.report().steps["dense"] == 0


def test_a_copy_of_an_accelerated_scheduler_is_not_watched(pipe, run):
    """LTX-2 copies its scheduler for the audio, which takes its own steps."""
    with accelerate(pipe, "none") as first, accelerate(make_pipe(scheduler=pipe.scheduler), "none"):
        other = copy.deepcopy(pipe.scheduler)
        run(pipe)
        assert other.step_index is None and other.step.__self__ is other
        other.set_timesteps(7)
        other.step(torch.ones(1), other.timesteps[0], torch.ones(1))
        assert len(first.sigmas) == 4 and other.step_index == 1


@pytest.mark.parametrize("cast", [lambda t: t, lambda t: t.to(torch.bfloat16), lambda t: t.expand(1, 48).clone()])
def test_the_step_is_read_off_the_timestep(cast):
    """As a view of the scheduler's list, rounded to bfloat16, and per token."""
    scheduler, state = FlowMatchEulerDiscreteScheduler(shift=3.0), RunState()
    scheduler.set_timesteps(7)
    state.begin_generation(scheduler)
    for step, timestep in enumerate(scheduler.timesteps):
        with state.context("cond"):
            state.enter("transformer", cast(timestep.expand(1)), Tokens((3, 4, 4)))
        assert (state.step, state.branch, state.expert) == (step, "cond", "transformer")
        state.leave()
    state.enter("transformer", torch.tensor([5000.0]), Tokens((3, 4, 4)))
    assert state.step is None


def test_save_after_restore(pipe, run, tmp_path):
    with accelerate(pipe, Plan.uniform("pooled", 0.3, block=16)):
        run(pipe)
    pipe.transformer.save_pretrained(tmp_path)
    again = type(pipe.transformer).from_pretrained(tmp_path)
    saved, mine = again.state_dict(), pipe.transformer.state_dict()
    assert saved.keys() == mine.keys() and all(torch.equal(saved[name], mine[name]) for name in mine)
    torch.testing.assert_close(run(make_pipe(transformer=again, vae=pipe.vae)), run(pipe), atol=1e-5, rtol=1e-5)


def test_compiled_layers_share_their_graphs(run):
    import torch._dynamo

    pipe = make_pipe(transformer=make_transformer(layers=10))
    plan = Plan.uniform("pooled", 0.3, dense_steps=1, block=16)
    with accelerate(pipe, plan):
        eager = run(pipe)
    torch._dynamo.reset()
    with accelerate(pipe, plan):
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(run(pipe), eager, atol=1e-4, rtol=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the block, and the hook before it


def test_auto_goes_dense_on_short_clips_and_says_so(pipe, run):
    dense = run(pipe)
    with accelerate(pipe) as handle:
        assert torch.equal(run(pipe), dense)
        report = handle.report()
    assert "no plan is shipped" in report.plan_source
    assert len(report.fallbacks) == 1 and "48 tokens are fewer than 1024" in report.fallbacks[0]


def test_refusals_change_nothing(pipe, run, tmp_path):
    dense = run(pipe)
    with pytest.raises(
        AccelerateError, match="the cache 'quick' is unknown; allowed are auto, none, easy, table, rate"
    ):
        accelerate(pipe, cache="quick")
    with pytest.raises(AccelerateError, match="this plan's has no cached steps"):
        accelerate(pipe, cache="schedule")
    with pytest.raises(AccelerateError, match="'fast' is unknown"):
        accelerate(pipe, backend="fast")
    with pytest.raises(AccelerateError, match="dense='quick' is unknown; allowed are auto, fastest, flash"):
        accelerate(pipe, dense="quick")
    with pytest.raises(AccelerateError, match="dense='sage' cannot run on cpu"):
        accelerate(pipe, dense="sage")
    with pytest.raises(AccelerateError, match="dense='_native_cudnn' cannot run on cpu"):
        accelerate(pipe, dense="_native_cudnn")
    with pytest.raises(AccelerateError, match="fetched from the Hub"):
        accelerate(pipe, dense="sage_hub")
    with pytest.raises(AccelerateError, match="plan is a int"):
        accelerate(pipe, 3)
    with pytest.raises(PlanError, match="there is no plan"):
        accelerate(pipe, tmp_path / "missing.safetensors")
    with pytest.raises(AccelerateError, match="not a Diffusers pipeline"):
        accelerate(object())
    with accelerate(pipe, "none"), pytest.raises(AccelerateError, match="already accelerated"):
        accelerate(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(AccelerateError, match="disable_cache"):
        accelerate(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe), dense)


@pytest.mark.parametrize("dense", ["auto", "native", "_native_math", "fastest"])
def test_dense_calls_run_on_what_was_asked_for(pipe, run, dense):
    expected = run(pipe)
    with accelerate(pipe, "none", dense=dense) as handle:
        torch.testing.assert_close(run(pipe), expected, atol=1e-4, rtol=1e-4)
        report = handle.report()
    assert report.dense_backend == {"auto": "diffusers", "fastest": "native"}.get(dense, dense)
    if dense == "fastest":
        assert "the fastest here for 48 tokens: native" in report.dense_reason


def test_plans_run_densely_above_the_break_even_but_uniform_ones_do_not(pipe, run):
    dense = run(pipe)
    plan = replace(Plan.uniform("pooled", 0.9, block=4), break_even=True)
    with accelerate(pipe, plan) as handle:
        assert torch.equal(run(pipe), dense)
        report = handle.report()
    assert report.steps["sparse"] == 0 and "would not be faster" in report.fallbacks[0]
    with accelerate(pipe, replace(plan, break_even=False)) as handle:
        run(pipe)
        assert handle.report().steps["dense"] == 0


def test_restoring_lets_go_of_static_layouts(pipe, run):
    from pointillist.accel.layouts import _static_layout

    with accelerate(pipe, Plan.uniform("window", 0.4, block=16)):
        run(pipe)
        assert _static_layout.cache_info().currsize == 1  # of all layers, steps and branches
    assert _static_layout.cache_info().currsize == 0
