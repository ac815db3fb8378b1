"""Looking into a clip of a tiny Wan: maps, masks and what a token sees are those of the run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pointillist.accel.accelerate import accelerate
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.schedule import Schedule
from pointillist.pipelines import inspect as module
from pointillist.pipelines.engine import Engine
from pointillist.pipelines.generate import GenerateRequest, generate
from pointillist.pipelines.inspect import InspectRequest, Recording, frames_of, inspect
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.repaint import RepaintRequest, repaint
from pointillist.pipelines.video import OutputError

GRID, TOKENS, STEPS = (3, 4, 4), 48, 4
MIXED = (Rule("pooled", 0.4), Rule("window", 0.4)), (Rule("semantic", 0.5), Rule("dense", 1.0))
HOISTED = ((Rule("window", 0.4), Rule("pooled", 0.3)),)


def make(folder, tiny_folder, table=MIXED, **changes):
    """A clip of 9 frames of 64×64 pixels whose first step is dense and last is reused."""
    sigmas = (1.0, 0.86, 0.6)
    plan = Plan(
        "mine", table, schedule=Schedule(dense_steps=1, computed=sigmas), tail="pooled", block=8, break_even=False,
        **changes,
    )  # fmt: skip
    plan.save(folder / "plan.safetensors")
    request = GenerateRequest(
        prompt="a red circle", output=folder / "clip.mp4", model=str(tiny_folder), width=64, height=64, frames=9,
        steps=STEPS, seed=3, plan=str(folder / "plan.safetensors"),
    )  # fmt: skip
    return generate(request)


@pytest.fixture(scope="module")
def clip(tiny_folder, tmp_path_factory):
    return make(tmp_path_factory.mktemp("clip"), tiny_folder)


@pytest.fixture(scope="module")
def recording(clip, tmp_path_factory):
    return inspect(InspectRequest(clip.output, tmp_path_factory.mktemp("recording") / "mine.safetensors", step=2))


def observed(clip, step):
    """q, k [H, S, D], what was kept [H, S, S] and the density of every layer, seen with the runtime's own eyes."""
    facts, seen, laid_of = clip.facts, {}, {}
    pipe = load_pipeline(facts["model"])
    call = dict(
        prompt=facts["prompt"], negative_prompt="", width=64, height=64, num_frames=9, num_inference_steps=STEPS,
        guidance_scale=facts["guidance"], output_type="latent", generator=torch.Generator().manual_seed(facts["seed"]),
    )  # fmt: skip

    def observe(site, branch, at, q, k, v, out):
        if (branch, at) == ("cond", step):
            seen[site] = (q[0].transpose(0, 1).clone(), k[0].transpose(0, 1).clone())

    def observe_layout(site, branch, at, laid):
        if (branch, at) == ("cond", step):
            laid_of[site] = laid.layout.token_mask(1, 2)[0].clone()

    with accelerate(pipe, facts["request"]["plan"]) as handle:
        handle.observe(observe)
        handle.observe_layouts(observe_layout)
        pipe(**call)
        report = handle.report()
    return seen, laid_of, report


def test_what_is_shown_is_what_ran(clip, recording):
    seen, laid_of, report = observed(clip, 2)
    assert recording.sites == tuple(seen) and recording.heads == 2 and recording.grid == GRID
    assert recording.kinds == report.kinds == ("dense", "sparse", "sparse", "cached") and recording.kind == "sparse"
    for layer, site in enumerate(recording.sites):
        q, k = seen[site]
        for head in range(2):
            weights = (q[head] @ k[head].T / math.sqrt(q.shape[-1])).softmax(-1).numpy()
            assert recording.attention(layer, head) == pytest.approx(TOKENS * weights, rel=0.01, abs=0.01)  # halves
            kept = laid_of[site][head].numpy()
            assert np.array_equal(recording.kept(layer, head) > 0.5, kept)
            assert recording.density(layer, head) == pytest.approx(kept.mean(), abs=1e-6)
            for token in (0, 17, 47):
                mine = recording.seen(layer, head, token)
                assert np.array_equal(mine.kept.ravel(), kept[token])
                assert mine.weights.ravel() == pytest.approx(weights[token], abs=0.002)
                assert mine.recall == pytest.approx(weights[token][kept[token]].sum(), abs=0.01)


def test_a_hoisted_order_is_undone(tiny_folder, tmp_path):
    plain = make(tmp_path, tiny_folder, HOISTED)
    before = inspect(InspectRequest(plain.output, tmp_path / "a.safetensors", step=0))
    hoisted = make(tmp_path, tiny_folder, ((Rule("pooled", 0.3, (("order", "gilbert"),)),),), hoist="gilbert")
    dense = inspect(InspectRequest(hoisted.output, tmp_path / "b.safetensors", step=0))
    assert dense.attention(0, 1) == pytest.approx(before.attention(0, 1), abs=0.05)
    sparse = inspect(InspectRequest(hoisted.output, tmp_path / "c.safetensors", step=1))
    seen = sparse.seen(0, 0, 5)
    assert 0 < seen.kept.mean() < 1 and sparse.density(0, 0) == pytest.approx(0.3, abs=0.15)
    assert np.array_equal(seen.kept.ravel(), sparse.kept(0, 0)[5] > 0.5)


def test_a_dense_step_keeps_everything(clip, tmp_path):
    found = inspect(InspectRequest(clip.output, tmp_path / "r.safetensors", step=0))
    assert found.kind == "dense" and found.density(1, 1) == 1 and (found.kept(0, 0) == 1).all()
    assert found.seen(0, 0, 3).recall == pytest.approx(1, abs=1e-4)


def test_the_file_is_all_there_is(clip, recording):
    again = Recording.load(recording.path)
    assert again == recording and again.plan == Plan.load(clip.facts["request"]["plan"])
    assert again.facts["prompt"] == "a red circle" and len(again.sigmas) == len(again.step_seconds) == STEPS
    assert set(again.call_seconds[again.sites[0]]) == {"dense", "sparse"} and again.refreshed is None


def test_the_memory_is_bounded(clip, tmp_path, monkeypatch):
    each = TOKENS * (4 * 16 + 8)
    monkeypatch.setattr(module, "LIMIT", 3 * each)
    few = inspect(InspectRequest(clip.output, tmp_path / "few.safetensors", step=1, layer=1))
    assert few.kept_places == ((0, 0), (1, 0), (1, 1))  # all heads of the wanted layer first
    with pytest.raises(ValueError, match="3 of 4: record the clip again"):
        few.attention(0, 1)
    assert few.path.stat().st_size < 6 * each + 8000


def test_refreshed_regions(tiny_folder, tmp_path):
    request = GenerateRequest(
        prompt="a red circle", output=tmp_path / "clip.mp4", model=str(tiny_folder), width=64, height=64, frames=9,
        steps=6, seed=3, pattern="pooled", density=0.5, regions="change:share=0.5,every=3",
    )  # fmt: skip
    kinds = generate(request).facts["kinds"]
    found = inspect(InspectRequest(request.output, tmp_path / "r.safetensors"))
    assert found.refreshed.shape == GRID and 0 < found.refreshed.min() < found.refreshed.max() == 1
    assert "region" in kinds and found.kinds == tuple(kinds)
    with pytest.raises(ValueError, match="computes a part of the tokens"):
        inspect(InspectRequest(request.output, tmp_path / "r.safetensors", step=kinds.index("region")))


def test_what_cannot_be_looked_into_is_told(clip, tiny_folder, tmp_path):
    out = tmp_path / "r.safetensors"
    with pytest.raises(ValueError, match=r"step 3 reuses another step.* those of 0, 1, 2 can"):
        inspect(InspectRequest(clip.output, out, step=3))
    with pytest.raises(ValueError, match="steps 0 to 3"):
        inspect(InspectRequest(clip.output, out, step=4))
    with pytest.raises(ValueError, match="must end in"):
        InspectRequest(clip.output, tmp_path / "r.mp4")
    with pytest.raises(OutputError, match="no file"):
        inspect(InspectRequest(tmp_path / "none.mp4", out))
    with pytest.raises(OutputError, match="not what `inspect` writes"):
        Recording.load(Path(clip.facts["request"]["plan"]))
    painted = repaint(RepaintRequest(clip.output, "0,0,32,32", "black", tmp_path / "new.mp4"))
    with pytest.raises(OutputError, match="was repainted"):
        inspect(InspectRequest(painted.output, out))
    assert not out.exists()


def test_it_is_a_job_of_the_engine(clip, tmp_path):
    with Engine() as engine:
        job = engine.submit(InspectRequest(clip.output, tmp_path / "r.safetensors"))
        assert job.result().step == 2
        told = [event for event in job.events() if getattr(event, "steps", 0)]
        assert [event.step for event in told] == [0, 1, 2, 3, 4]


def test_frames_that_show_latent_frames():
    assert frames_of(9, 33) == (0, 3, 7, 11, 15, 19, 23, 27, 31)
    assert frames_of(1, 1) == (0,) and frames_of(3, 9) == (0, 3, 7)


def test_facts_tell_the_times_of_steps_and_calls(clip):
    facts = clip.facts
    assert facts["grid"] == list(GRID) and len(facts["sigmas"]) == len(facts["step_seconds"]) == STEPS
    assert sum(facts["step_seconds"]) == pytest.approx(facts["seconds"]["denoise"], abs=1e-3)
    assert set(facts["call_ms"]) == {f"transformer.blocks.{layer}.attn1" for layer in range(2)}
    assert all(0 < ms < 1e4 for kinds in facts["call_ms"].values() for ms in kinds.values())
    json.dumps(facts, allow_nan=False)
