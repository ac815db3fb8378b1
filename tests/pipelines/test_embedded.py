"""The model that ships: an ordinary folder, small, repeatable, with a plan of its own."""

import math

import pytest
import torch

from pointillist import accelerate, defaults, load_pipeline
from pointillist.accel.choose_plan import shipped_plans
from pointillist.accel.models.wan import Wan
from pointillist.pipelines.embedded import EMBEDDED_FOLDER
from pointillist.pipelines.embedded.vocabulary import KNOWN_WORDS

SMALL = {"height": 64, "width": 64, "num_frames": 33, "num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("embedded")


def clip(pipe, seed=0, **changes):
    options = {**SMALL, **changes}
    generator = torch.Generator().manual_seed(seed)
    return pipe("a red circle moving left on black", generator=generator, output_type="pt", **options).frames


def test_it_is_small_and_needs_no_code_of_ours():
    from diffusers import WanPipeline

    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.rglob("*.safetensors")) <= 24e6
    plain = WanPipeline.from_pretrained(EMBEDDED_FOLDER)
    assert not any("pointillist" in type(part).__module__ for part in plain.components.values())
    vocabulary = set(plain.tokenizer.get_vocab()) - {"<pad>", "</s>", "<unk>"}
    assert vocabulary == KNOWN_WORDS


def test_one_seed_gives_one_clip(pipe):
    first, again, other = clip(pipe), clip(pipe), clip(pipe, seed=1)
    assert first.shape == (1, 33, 3, 64, 64) and first.isfinite().all()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_shipped_plans_are_for_it_and_restoring_leaves_no_trace(pipe):
    plans, size = shipped_plans(), defaults(pipe)
    assert [plan.name for plan in plans] == ["embedded-balanced", "embedded-fast", "embedded-quality"]
    grid = ((size["num_frames"] - 1) // 4 + 1, size["height"] // 8, size["width"] // 8)
    for plan in plans:
        assert plan.model == Wan().fingerprint(pipe.transformer)
        assert plan.grid == grid and math.prod(grid) >= 4000
        assert plan.measured["psnr"] > 20 and len(plan.schedule.computed) < size["num_inference_steps"]
    before = clip(pipe, height=128, width=128)
    with accelerate(pipe) as handle:
        assert not torch.equal(clip(pipe, height=128, width=128), before)
        report = handle.report()
    assert report.steps["sparse"] > 0 and "shipped for this model" in report.plan_source
    assert torch.equal(clip(pipe, height=128, width=128), before)
