"""Curves that are recorded of tiny, real pipelines, against their definitions and Diffusers' own calibration."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import MagCacheConfig
from typer.testing import CliRunner

from conftest import make_pipe, make_transformer
from families import Family
from pointillist import Plan, accelerate, load_pipeline
from pointillist.accel.step_cache.calibration import Calibration
from pointillist.accel.step_cache.policy import Caching
from pointillist.cli import app
from pointillist.search.cache_curves import calibrate_cache, fitted, recorded
from pointillist.search.errors import SearchError


@pytest.mark.parametrize("name", ["wan", "flux", "ltx"])
def test_a_curve_is_that_of_diffusers(name, capsys):
    """Of both guidance branches, whose mean is taken."""
    family = Family(name)
    family.pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=6))
    family.run(steps=6)
    family.pipe.transformer.disable_cache()
    lists = [json.loads(each) for each in re.findall(r"^\[[\d., e-]+\]$", capsys.readouterr().out, re.M)]
    assert len(lists) == (1 if name == "ltx" else 2)  # there guidance is a batch
    dense, before = family.run(steps=6), [set(vars(module)) for module in family.pipe.transformer.modules()]
    found = recorded(family.pipe, [lambda: family.run(steps=6)])
    assert [set(vars(module)) for module in family.pipe.transformer.modules()] == before
    assert torch.equal(family.run(steps=6), dense)
    assert found.curve == pytest.approx(np.mean(lists, 0), abs=2e-4) and found.curve[0] == 1
    assert found.made_with.steps == 6 and found.made_with.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert found.made_with.plan == "none" and found.spread == 0 and found.prompts == 1
    assert (found.polynomial is None) == (name != "wan")


def test_distances_are_their_definition():
    family, seen, steps = Family("wan"), {}, 5
    hook = family.pipe.transformer.condition_embedder.register_forward_hook(
        lambda module, args, output: seen.setdefault("modulation", []).append(output[1].clone())
    )
    with accelerate(family.pipe, "none") as handle:

        def keep(name, branch, step, compute):
            output = compute()
            seen.setdefault(branch, []).append(output[0].clone())
            return output

        handle.intercept(keep)
        family.run(steps=steps)
    hook.remove()

    def change(new, old):
        return float((new - old).abs().mean() / old.abs().mean())

    modulation = seen.pop("modulation")[:: len(seen)]
    expected = sorted(
        (change(modulation[i], modulation[i - 1]), change(outs[i], outs[i - 1]))
        for outs in seen.values()
        for i in range(1, steps)
    )
    found = recorded(family.pipe, [lambda: family.run(steps=steps)])
    assert len(seen) == 2 and np.array(found.distances) == pytest.approx(np.array(expected), rel=1e-4)


def test_polynomials_are_those_of_the_points():
    true = (3.0, -1.0, 0.5, 2.0, 0.1)
    places = np.linspace(0.05, 0.6, 12)
    pairs = [(x, float(np.polyval(true, x))) for x in places]
    assert fitted(pairs) == pytest.approx(true, rel=1e-3)
    assert len(fitted(pairs[:4])) == 2 and len(fitted(pairs[:2])) == 2  # few places, few degrees
    assert fitted([(0.2, 0.4), (0.2, 0.6)]) == pytest.approx((2.5, 0.0)) and fitted([]) is None


def test_two_transformers_make_one_curve(run):
    """The step at which the second takes over has its own ratio, but no distance of two models' modulations."""
    pipe = make_pipe(transformer_2=make_transformer(), boundary_ratio=0.7)
    found = recorded(pipe, [lambda: run(pipe, steps=6), lambda: run(pipe, steps=6, seed=8)])
    assert found.made_with.model.count("+") == 0 and len(found.curve) == 6 and all(each > 0 for each in found.curve)
    assert len(found.distances) == 2 * 2 * 4 and found.prompts == 2 and found.spread > 0


def test_it_can_be_recorded_with_sparse_attention(run):
    pipe, plan = make_pipe(), Plan.uniform("pooled", 0.3, block=16)
    dense = recorded(pipe, [lambda: run(pipe, steps=6)])
    sparse = recorded(pipe, [lambda: run(pipe, steps=6)], plan)
    assert sparse.made_with.plan == plan.name and sparse.curve != dense.curve


CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 9, "guidance_scale": 3.0}


def test_a_calibrated_cache_reuses_where_its_curve_says_so(tiny_folder, tmp_path):
    pipe = load_pipeline(str(tiny_folder))
    found = calibrate_cache(pipe, ("a red circle", "circle on black"), CALL)
    found.save(tmp_path / "curve.json")
    errors = [abs(1 - each) for each in found.curve]
    for threshold in (1e-9, 1e5):
        options = f"file={tmp_path / 'curve.json'},threshold={threshold},first=0.2"
        with accelerate(pipe, "none", cache=Caching.parse(f"magnitude:{options}")) as handle:
            pipe(prompt="a red circle", **CALL, output_type="latent")
            report = handle.report()
        assert ("cached" in report.kinds) == (threshold > max(errors))
        assert not any("calibrated" in note for note in report.fallbacks)
    with accelerate(pipe, "none", cache=Caching.parse(f"modulated:{options}")) as handle:
        pipe(prompt="a red circle", **CALL, output_type="latent")
        assert "cached" in handle.report().kinds


def test_what_cannot_be_calibrated_is_told(pipe):
    with pytest.raises(SearchError, match="no prompt"):
        calibrate_cache(pipe, (), CALL)
    with pytest.raises(SearchError, match="1 steps have no changes"):
        calibrate_cache(pipe, ("x",), {**CALL, "num_inference_steps": 1})


def test_the_command(tiny_folder, tmp_path):
    output = tmp_path / "curve.json"
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    arguments = ["bench", "cache", "--model", str(tiny_folder), "--prompts", str(tmp_path / "prompts.txt")]
    size = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "4"]
    result = CliRunner().invoke(app, [*arguments, *size, "--output", str(output), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    told, found = json.loads(result.stdout), Calibration.load(output)
    assert told["curve"] == list(found.curve) and len(found.curve) == 4 and told["output"] == str(output)
    result = CliRunner().invoke(app, [*arguments, *size, "--output", str(output)], catch_exceptions=False)
    assert f"--cache modulated:file={output}" in result.stdout.replace("\n", "")
    with pytest.raises(ValueError, match=r"must be a FILE\.json"):
        CliRunner().invoke(app, [*arguments, "--output", "curve.txt"], catch_exceptions=False)
    with pytest.raises(ValueError, match="allowed are float32"):
        CliRunner().invoke(app, [*arguments, "--output", str(output), "--dtype", "int8"], catch_exceptions=False)
