"""A step at true size: counts against closed forms, bills that add up, a measurement of a tiny model."""

import json

import pytest
import torch

from pointillist import Plan
from pointillist.hardware.profile import load_profile
from pointillist.pipelines.real_size import FILE, RealSize, counted, estimated, kinds_of, measured

TINY = RealSize(
    "tiny", "WanTransformer3DModel",
    dict(
        patch_size=[1, 2, 2], num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ),
    dict(hidden_states=[1, 4, 5, 16, 16], encoder_hidden_states=[1, 7, 8]),
    text=0, steps=10, shift=3.0, passes=2, size="tiny", source="nowhere",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tokens", "sites", "billions"),
    [("wan2.1-1.3b", 32_760, 30, 1.42), ("wan2.1-14b", 75_600, 40, 14.3), ("hunyuanvideo", 119_056, 60, 12.8),
     ("flux", 4_608, 57, 11.9)],
)  # fmt: skip
def test_models_have_their_published_sizes(name, tokens, sites, billions):
    found = counted(RealSize.named(name))
    assert (found["tokens"], found["sites"]) == (tokens, sites)
    assert found["parameters"] / 1e9 == pytest.approx(billions, rel=0.01)
    assert 0 < found["attention_tflop"] < found["tflop"]


def test_operations_are_those_of_the_formulas():
    """Of a Wan of one layer more: its linear layers and its two attentions."""
    tokens, width, text, mlp = 5 * 8 * 8, 32, 7, 32
    more = [counted(RealSize(**{**vars(TINY), "config": {**TINY.config, "num_layers": n}}))["tflop"] for n in (2, 3)]
    linear = 2 * (6 * tokens * width**2 + 2 * text * width**2 + 2 * tokens * width * mlp)
    attention = 4 * tokens * (tokens + text) * width
    assert (more[1] - more[0]) * 1e12 == pytest.approx(linear + attention, rel=1e-6)


@pytest.mark.parametrize("name", json.loads(FILE.read_text()))
def test_estimates_add_up(name):
    model = RealSize.named(name)
    found = estimated(model, "auto", load_profile("h200"), torch.bfloat16)
    assert found["estimate"] and sum(found["steps"].values()) == model.steps
    assert found["seconds"]["plan"] <= found["seconds"]["dense"] * 1.0001
    clip = found["steps"]["dense"] * found["seconds"]["dense"] + found["steps"]["sparse"] * found["seconds"]["plan"]
    assert found["clip_seconds"]["plan"] == pytest.approx(clip)


def test_a_small_model_is_measured_and_scaled():
    plan = Plan.uniform("window", 0.3, block=16, dense_steps=2)
    found = measured(TINY, plan, torch.device("cpu"), torch.float32, layers=2, rounds=1, progress=lambda text: None)
    assert not found["estimate"] and (found["layers_measured"], found["layers"]) == (2, 4)
    assert found["density"] == pytest.approx(0.3, abs=0.05) and found["fallbacks"] == []
    assert 0 < found["attention_share"]["plan"] < 1 and found["steps"] == dict(dense=2, sparse=8, cached=0, region=0)


def test_what_is_not_possible_is_said():
    with pytest.raises(ValueError, match=r"'wan3' is unknown; allowed are wan2\.1-1\.3b"):
        RealSize.named("wan3")
    nothing = Plan.uniform("dense", 1.0)
    with pytest.raises(ValueError, match="no sparse step"):
        measured(TINY, nothing, torch.device("cpu"), torch.float32, 1, 1, lambda text: None)
    assert kinds_of(Plan.uniform("window", 0.3, dense_steps=1), (1.0, 0.5)) == ["dense", "sparse"]
