"""A whole search on a tiny pipeline: resumed, sharded, refused, and what its predictions are made of."""

import copy
import shutil
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pointillist.accel.accelerate import accelerate
from pointillist.accel.plan import Plan, Rule, Schedule
from pointillist.accel.regions.policy import Regions
from pointillist.hardware.profile import load_profile
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.search import find_plan, machine, study_of
from pointillist.search import profile, region_errors
from pointillist.search.assign import OverBudget
from pointillist.search.cost_model import CostModel
from pointillist.search.curve import Choices, DenseTimes
from pointillist.search.errors import SearchError
from pointillist.search.evaluate import evaluate
from pointillist.search.find import Search
from pointillist.search.record import SearchRecord
from pointillist.search.run import call_of, run
from pointillist.search.sensitivity import REFERENCE, record_playback
from pointillist.search.timeline import timeline
from pointillist.search.wish import Wish, _named

RULES = (
    Rule("dense", 1.0), Rule("skip", 1.0), Rule("skip", 1.0, (("reuse", True),)), REFERENCE, Rule("pooled", 0.5),
    Rule("masses", 0.4), Rule("window", 0.4), Rule("semantic", 0.5),
)  # fmt: skip
CALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 6}
PROMPTS = ("a red circle", "a circle on black")
HELD_OUT = ("red on black",)
HARDWARE = replace(load_profile("ryzen-7700x"), launch_us=0, row_us=0, gather_ps=0, memory_gbs=1e6)
"""A machine on which sparse attention pays at 48 tokens."""


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_pipeline(str(tiny_folder))


def make_study(tiny):
    return replace(study_of(tiny, PROMPTS, **CALL), rules=RULES, block=8, tails=("pooled", "none"))


def make_search(tiny, folder, stages=True, reuse=False):
    return Search(tiny, make_study(tiny), folder, stages=stages, reuse=reuse)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """The folder of a search whose measurements are complete."""
    search = make_search(tiny, tmp_path_factory.mktemp("search"))
    search.measure()
    return search.folder


def found(tiny, folder, wish=None, held_out=(), here=False, reuse=False):
    search = make_search(tiny, folder, reuse=reuse)
    return search.find(wish or Wish(), "mine", HARDWARE, held_out, here)


def test_the_plan_runs_and_its_file_holds_how_it_was_found(tiny, measured, tmp_path):
    result = found(tiny, measured)
    result.record.save(result.plan, tmp_path / "plan.safetensors")
    plan = Plan.load(tmp_path / "plan.safetensors")
    assert plan == result.plan and plan.model and plan.grid == (3, 4, 4)
    record = SearchRecord.load(tmp_path / "plan.safetensors")
    assert len(record.points) >= 5 and sum(point.chosen for point in record.points) == 1
    assert record.errors.shape == (3, 2, 2)
    with accelerate(tiny, plan) as handle:
        tiny(prompt=PROMPTS[0], **CALL, output_type="latent", generator=torch.Generator().manual_seed(0))
        report = handle.report()
    steps = timeline(make_study(tiny), plan.schedule.dense_every)
    assert report.steps == {"dense": steps.dense, "sparse": len(steps.sparse), "cached": 0, "region": 0}
    assert report.density == pytest.approx(next(p.density for p in record.points if p.chosen), abs=0.15)


def test_the_curve_is_told_as_it_grows_and_every_point_has_its_plan(tiny, measured):
    told = []
    search = make_search(tiny, measured)
    result = search.find(Wish(speedup=1.01), "mine", HARDWARE, HELD_OUT, False, told.append)
    assert all(point.measured_psnr is None for point, _ in told[0]) and len(told) >= 2
    for curve in told[1:]:
        assert any(point.measured_psnr is not None for point, _ in curve)
    assert len(result.plans) == len(result.record.points)
    for point, plan in zip(result.record.points, result.plans, strict=True):
        assert plan.predicted["speedup"] == pytest.approx(point.predicted_speedup, abs=1e-3)
        assert plan.predicted["psnr"] == pytest.approx(point.predicted_psnr, abs=1e-2)
        assert plan.measured.get("psnr") == (None if point.measured_psnr is None else round(point.measured_psnr, 4))
        assert (plan == result.plan) == point.chosen


def test_steps_are_reused_where_that_costs_less_than_sparser_attention(tiny, measured):
    plain, reusing = (found(tiny, measured, Wish(speedup=1.2), reuse=reuse).plan for reuse in (False, True))
    assert reusing.predicted["psnr"] >= plain.predicted["psnr"] and not plain.schedule.computed
    assert reusing.predicted["speedup"] >= 1.19 and 2 <= len(reusing.schedule.computed) < 6
    with accelerate(tiny, reusing) as handle:
        tiny(prompt=PROMPTS[0], **CALL, output_type="latent", generator=torch.Generator().manual_seed(0))
        report = handle.report()
    assert report.steps["cached"] + report.steps["region"] == 6 - len(reusing.schedule.computed)
    assert found(tiny, measured, Wish(speedup=1.2), reuse=True).plan == reusing
    with pytest.raises(SearchError, match="no plan makes denoising 900"):
        found(tiny, measured, Wish(speedup=900), reuse=True)


def test_what_reusing_loses_is_predicted(tiny, measured):
    """Schedules of reused steps alone, run without sparse attention, against what their errors were predicted to be."""
    search = make_search(tiny, measured, reuse=True)
    choices = search.choices(HARDWARE, None)
    clips = {}
    reuse = {len(each.computed): each for each in choices._reuse if not each.region_after}
    for count in (2, 3, 4, 6):
        schedule = Schedule(computed=choices._shares_of(reuse[count].computed))
        plan = replace(Plan.uniform("dense", 1.0), schedule=schedule)
        with accelerate(tiny, plan):
            clips[count] = run(tiny, search.study, PROMPTS[0], lambda step: None)
    errors = [float(((clips[count] - clips[6]) ** 2).mean()) for count in (2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    for count, error in zip((2, 3, 4), errors, strict=True):  # that errors point one way is the worst that can be
        assert 0.002 < error / reuse[count].error < 3, errors


def test_what_region_steps_lose_is_recorded_along_the_dense_run(tiny, measured, monkeypatch):
    study, clips = make_study(tiny), []
    playback = record_playback(tiny, study, lambda step: None)
    monkeypatch.setattr(region_errors, "run", lambda *args: clips.append(run(*args)))
    kept, keys = region_errors.region_losses(tiny, study, playback, lambda step: None)
    assert np.array_equal(clips[0], playback.frames)  # the latents were those of the dense run in every step
    assert np.isinf(kept[:2]).all() and np.isinf(keys[:2]).all()
    assert (kept[2:] > 0.05).all() and (kept[2:] < 1.5).all() and (keys[2:] > 1e-3).all()
    monkeypatch.setattr(region_errors, "SHARE", 1.0)
    every = region_errors.region_losses(tiny, study, playback, lambda step: None)
    assert (every[:, 2:] < 1e-8).all()  # all tokens are computed


def test_what_region_steps_lose_has_two_parts():
    """Of made-up velocities: the first half of the tokens hold on to theirs, the others are off by a number."""
    sigmas, computed = (1.0, 0.8, 0.7, 0.5, 0.4), (0, 1, 4)
    right = torch.randn(5, 40)
    found, errors = {}, {2: 0.3, 3: 0.6}
    for step, error in errors.items():
        found[step] = torch.cat([right[1, :20], right[step, 20:] + error])
    kinds = dict.fromkeys(errors, "region")
    kept, keys = region_errors._interpolated(right, found, kinds, computed, sigmas)
    for step, error in errors.items():
        held = (right[1] - right[step]).square()
        assert kept[step] == pytest.approx(float((held[:20].sum() / held.sum()).sqrt()), rel=1e-4)
        remainder = (0.8 - sigmas[step]) * (1.0 - sigmas[step])
        assert keys[step] == pytest.approx(error * 0.5**0.5 / remainder, rel=1e-4)
    assert (kept[4], keys[4]) == (kept[3], keys[3]) and np.isinf([kept[:2], keys[:2]]).all()


def test_where_another_transformer_takes_over_there_is_no_region_step(tiny_folder):
    """It has no keys of earlier steps, so all tokens are computed there: nothing is lost, but nothing is saved."""
    pipe = load_pipeline(str(tiny_folder))
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.7)
    study = replace(make_study(pipe), call={**CALL, "num_inference_steps": 10}, steps=10, dense_steps=4)
    playback = record_playback(pipe, study, lambda step: None)
    switch = next(step for step, sigma in enumerate(playback.sigmas) if sigma < 0.7)
    lost = region_errors.region_losses(pipe, study, playback, lambda step: None)
    assert switch == 6 and np.isinf(lost[:, [0, 1, 2, 3, 6]]).all()
    assert (lost[:, [4, 5, 7, 8, 9]] > 1e-3).all() and np.isfinite(lost[:, [4, 5, 7, 8, 9]]).all()


def test_regions_that_lose_little_are_chosen(tiny, measured, monkeypatch):
    """With what region steps lose as recorded, and then with next to nothing."""
    search = make_search(tiny, measured, reuse=True)
    choices = search.choices(HARDWARE, None)
    assert any(each.region_after for each in choices._reuse)
    reuse = tuple(replace(each, error=1e-12) if each.region_after else each for each in choices._reuse)
    monkeypatch.setattr(choices, "_reuse", reuse)
    speedup = 1.3
    plan = choices.plan(choice := choices.at_speedup(speedup), "regions", "here")
    assert choice.region_after and set(choice.region_after) <= set(choice.computed) and choice.speedup >= 1.29
    assert plan.regions == Regions(region_errors.SHARE) and Plan.from_json(plan.to_json()) == plan
    with accelerate(tiny, plan) as handle:
        tiny(prompt=PROMPTS[0], **CALL, output_type="latent", generator=torch.Generator().manual_seed(0))
        kinds = handle.report().kinds
    after = {last for last, stop in pairwise((*choice.computed, 6)) if last in choice.region_after and stop > last + 1}
    assert after and all(kinds[last + 1] == "region" for last in after)


def test_sharded_and_merged_or_interrupted_and_resumed_it_is_the_same(tiny, measured, tmp_path, monkeypatch):
    whole = found(tiny, measured).plan
    sharded = make_search(tiny, tmp_path / "sharded")
    for index in (2, 0):
        sharded.measure((index, 3))
    with pytest.raises(SearchError, match=r"lacks 1 of 2 parts of the profile"):
        found(tiny, sharded.folder)
    sharded.measure((1, 3))
    assert found(tiny, sharded.folder).plan == whole

    stopped = make_search(tiny, tmp_path / "stopped")
    done = []

    def interrupt(phase, step, of):
        if "part 2" in phase and step == 4:
            raise KeyboardInterrupt
        done.append(phase)

    stopped.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        stopped.measure()
    stopped.progress = lambda *of: done.append(of[0])
    done.clear()
    stopped.measure()
    assert done and not any("part 1" in phase for phase in done)  # that part was kept
    assert found(tiny, stopped.folder).plan == whole
    assert not list(stopped.folder.glob(".*.safetensors*"))


def test_recorded_errors_are_those_of_the_guided_output(tiny, measured):
    """For heads that are skipped, or reused from the calibration step, by plain means."""
    study = make_study(tiny)
    prompt, bucket, layer = 0, 1, 1
    step, calls, weights = study.bucket_steps[bucket], {}, profile.output_weights(tiny)
    site = f"transformer.blocks.{layer}.attn1"

    def keep(name, branch, at, q, k, v, out):
        if name == site:
            calls[branch, at] = out.clone()[0].transpose(0, 1).double()

    with accelerate(tiny, "none") as handle:
        handle.observe(keep)
        generator = torch.Generator().manual_seed(study.seed)
        tiny(prompt=PROMPTS[prompt], **study.call, output_type="latent", generator=generator)
    weight = weights[site][1].double().unflatten(1, (2, 16))
    guidance = study.call["guidance_scale"]

    def guided(at):
        return guidance * calls["cond", at] + (1 - guidance) * calls["uncond", at]

    def squared(x):
        return torch.einsum("hsd,chd->hsc", x, weight).square().sum((1, 2))

    true = torch.einsum("hsd,chd->sc", calls["uncond", step], weight).square().sum()
    one = profile.read(profile.file_of(measured, study, profile.passes(study)[prompt]))[0]["errors"]
    assert torch.allclose(one[bucket, layer, 1, 0, 0], squared(guided(step)) / true, rtol=1e-3)
    reused = squared(guided(study.calibration_step) - guided(step)) / true
    assert torch.allclose(one[bucket, layer, 2, 0, 0], reused, rtol=0.03)
    assert (one[:, :, 0] == 0).all()  # dense
    assert (one[:, :, 1:] > 0).all()


def test_the_weight_of_a_place_is_what_its_error_does_to_the_clip(tiny, measured):
    """Predicted for the reference candidate in one bucket: by construction the measured error of that bucket."""
    study = make_study(tiny)
    choices = make_search(tiny, measured).choices(HARDWARE, None)
    reference = np.full((3, 2, 2), RULES.index(REFERENCE))
    plain = choices.profile.errors[:, :, RULES.index(REFERENCE), 0, 0].numpy() * choices.weights[..., None]
    for bucket, error in enumerate(profile.read(make_search(tiny, measured)._weights_file)[0]["errors"].tolist()):
        assert plain[bucket].sum() == pytest.approx(error, rel=1e-6)
        alone = np.where(np.arange(3)[:, None, None] == bucket, reference, 0)
        assert 0 < choices.of(alone).error < 10 * error  # with the residual it is another
    assert study.rules[0].pattern == "dense"


def test_playback_without_a_perturbation_gives_the_dense_clip(tiny, measured):
    study = make_study(tiny)
    playback, calls = record_playback(tiny, study, lambda step: None), []
    with accelerate(tiny, "none") as handle:
        handle.intercept(playback.until(3))
        handle.observe(lambda site, branch, step, *rest: calls.append(step))
        frames = run(tiny, study, PROMPTS[0], lambda step: None)
    assert np.array_equal(frames, playback.frames)
    assert set(calls) == {3, 4, 5}  # the others were played


def test_one_table_serves_all_steps_unless_stages_are_asked_for(tiny, measured):
    plan = make_search(tiny, measured, stages=False).find(Wish(), "mine", HARDWARE, (), False).plan
    assert plan.stages == () and plan.table
    assert len(found(tiny, measured).record.boundaries) == 3


def test_more_time_gives_less_error_and_dense_none(tiny, measured):
    choices = make_search(tiny, measured).choices(HARDWARE, None)
    errors = [choices.at_attention(choices.dense.attention / speedup).error for speedup in (1.6, 1.3, 1.1)]
    assert errors == sorted(errors, reverse=True)
    assert choices.at_attention(choices.dense.attention * 1.001).error == 0


@pytest.mark.parametrize("stages", [False, True])
def test_a_choice_takes_the_time_that_is_asked_for(tiny, measured, stages):
    """As whole calls are predicted, which cost more than their heads; so on a machine where launches are dear."""
    for hardware in (HARDWARE, replace(HARDWARE, launch_us=0.02, row_us=0.02)):
        choices = make_search(tiny, measured, stages).choices(hardware, None)
        for speedup in (1.05, 1.15):
            seconds = choices.dense.attention / speedup
            choice = choices.at_attention(seconds)
            assert choices.attention_seconds(choice) <= 1.005 * seconds
            total = sum(astuple(choices.dense))
            assert choice.speedup == pytest.approx(total / (choices.attention_seconds(choice) + choices.dense.other))
        with pytest.raises(OverBudget):
            choices.at_attention(0.1 * choices.dense.attention / choices.study.steps)


def test_a_named_speed_is_had_although_a_faster_one_is_not(tiny, measured, monkeypatch):
    choices = make_search(tiny, measured).choices(HARDWARE, None)
    monkeypatch.setattr("pointillist.search.wish.ATTENTION_SPEEDUPS", {"quality": 1.1, "fast": 100.0})
    assert list(_named(choices, "quality")) == ["quality"]
    with pytest.raises(SearchError, match="sparse attention does not pay here"):
        _named(choices, "fast")


def test_errors_behind_late_dense_steps_are_predicted(tiny):
    """From two ages in each bucket, against errors measured at every step, where each third step is dense."""
    call = {**CALL, "num_inference_steps": 20, "guidance_scale": 1.0}
    rules = (Rule("dense", 1.0), Rule("skip", 1.0), Rule("skip", 1.0, (("reuse", True),)), Rule("window", 0.4))
    study = replace(study_of(tiny, PROMPTS[:1], **call), rules=rules, block=8, tails=("pooled",))
    calls, sites = {}, profile.output_weights(tiny)

    def keep(site, branch, step, q, k, v, out):
        calls[sites[site][0], step] = [x.clone() for x in (q, k, v, out)] + [handle.grid, sites[site][1]]

    with accelerate(tiny, "none") as handle:
        handle.observe(keep)
        tiny(prompt=PROMPTS[0], **study.call, output_type="latent", generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def errors(layer, since, step):
        """[candidates, heads]: without the loss of `since`, and with it."""
        known = {}
        for at, calibrate in ((since, True), (step, False)):
            q, k, v, out, grid, weight = calls[layer, at]
            found = evaluate(
                call_of(study, grid, layer, at, q, k, v), out.transpose(1, 2), weight, rules, study.tails, known, 100,
                calibrate,
            )  # fmt: skip
        return found.values[:, 0, 0], found.values[:, 0, 1]

    befores = (study.calibration_step, *study.bucket_steps)
    recorded = torch.stack([
        torch.stack([
            torch.stack([
                errors(layer, study.calibration_step, step)[0], errors(layer, study.calibration_step, step)[1],
                errors(layer, before, step)[1],
            ], 1) for layer in range(2)
        ]) for before, step in zip(befores, study.bucket_steps, strict=False)
    ])[:, :, :, None]  # fmt: skip
    made = profile.Profile(recorded, torch.zeros(0), torch.zeros(0), torch.zeros(0), (3, 4, 4), 1)
    choices = Choices(study, made, np.ones((3, 2)), CostModel(HARDWARE), DenseTimes(1.0, 1.0), (1.0,) * 20)
    for every in (0, 3):
        ratios = []
        for step in timeline(study, every).sparse:
            true = np.stack([errors(layer, step.since, step.step)[1].T.numpy() for layer in range(2)])
            found = choices._step_errors("pooled", step)
            assert np.allclose(found[:, :, 0], 0)
            assert np.allclose(found[:, :, 1], true[:, :, 1], rtol=0.2)  # skipped: nothing depends on the age
            ratios.append(found[:, :, 2:].sum((0, 1)) / true[:, :, 2:].sum((0, 1)))
        assert 0.75 < np.median(ratios) < 1.33 and np.min(ratios) > 0.15 and np.max(ratios) < 6


def test_a_least_psnr_holds_on_the_held_out_prompt(tiny, measured):
    least = 30.0
    result = found(tiny, measured, Wish(psnr=least), HELD_OUT)
    assert result.plan.measured["psnr"] >= least
    assert "speedup" not in result.plan.measured  # another machine's times were not measured here


def test_wishes_that_cannot_be_met_say_what_can(tiny, measured):
    with pytest.raises(SearchError, match=r"no plan makes denoising 900.00 times as fast: .* is the most"):
        found(tiny, measured, Wish(speedup=900))
    with pytest.raises(ValueError, match="exclude each other"):
        Wish(speedup=2, psnr=30)
    with pytest.raises(ValueError, match="allowed are quality, balanced, fast"):
        Wish(speed="warp")
    with pytest.raises(ValueError, match="it must be a number from 1"):
        Wish(speedup=float("nan"))


def test_two_searches_in_one_folder(tiny, tmp_path):
    first, second = (make_search(tiny, tmp_path / "one") for _ in range(2))
    part = first._weights_file.stem
    with first._alone(part), pytest.raises(SearchError, match=f"another search is at {part} in"):
        second.measure()
    with first._alone(part):
        second.measure((0, 3))  # another part is free


def test_a_broken_part_is_named(tiny, measured, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(measured, folder)
    part = next(folder.glob("profile-*.safetensors"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(SearchError, match=f"{part.name} is broken: .* delete it"):
        found(tiny, folder)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SearchError, match="No space left on device; make room"):
        profile.write(tmp_path / "x.safetensors", b"x")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_searched(tiny):
    for changes, message in (
        ({"num_inference_steps": 1}, "there must be 2 or more"),
        ({"height": 60}, "height 60 is not possible"),
    ):
        with pytest.raises(ValueError, match=message):
            study_of(tiny, PROMPTS, **{**CALL, **changes})
    with pytest.raises(ValueError, match="holds no prompt"):
        study_of(tiny, (), **CALL)
    with pytest.raises(ValueError, match="it must be a tuple of texts"):
        study_of(tiny, "a red circle", **CALL)
    with pytest.raises(ValueError, match="among the prompts to calibrate on and the held-out ones"):
        find_plan(tiny, prompts=PROMPTS, held_out=PROMPTS[1:], hardware="h100", **CALL)
    with pytest.raises(ValueError, match=r"knows .*, not float64"):
        machine("h100", "float64", "cpu", lambda *of: None)
    with pytest.raises(ValueError, match="65 prompts; allowed are up to 64"):
        study_of(tiny, tuple(map(str, range(65))), **CALL)


def test_nothing_is_left_in_the_pipeline(tiny, measured):
    assert "forward" not in vars(tiny.transformer)
    latents = [
        tiny(prompt=PROMPTS[0], **CALL, output_type="latent", generator=torch.Generator().manual_seed(3)).frames
        for _ in range(2)
    ]
    assert torch.equal(*latents)


def test_the_digest_names_everything_that_matters(tiny):
    study = make_study(tiny)
    others = [
        replace(study, **change)
        for change in ({"seed": 1}, {"block": 16}, {"rules": RULES[:-1]}, {"prompts": PROMPTS[:1]}, {"dtype": "x"})
    ]
    assert len({each.digest("a") for each in (study, *others)} | {study.digest("b")}) == 7


def test_the_python_way(tiny, monkeypatch):
    """And where sparse attention cannot pay, it says so instead of making a plan that is slower than dense."""
    monkeypatch.setattr("pointillist.search.candidates.candidates", lambda: RULES)
    with pytest.raises(SearchError, match="sparse attention does not pay here"):
        find_plan(tiny, prompts=PROMPTS[:1], held_out=(), hardware="h100", speed="quality", cache=False, **CALL)


def test_steps_are_divided_into_buckets(tiny):
    study = make_study(tiny)
    assert study.edges == (1, 3, 4, 6) and study.bucket_steps == (1, 3, 4)
    assert replace(study, steps=2).edges == (1, 2)
