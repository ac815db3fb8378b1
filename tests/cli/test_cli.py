"""The command line: outputs, exit codes, one sentence per error."""

import json
import signal
import subprocess
import sys

import pytest

from pointillist import Plan
from pointillist.cli import run as cli
from pointillist.pipelines.video import read_settings

SMALL = ["--width", "192", "--height", "176", "--frames", "9", "--steps", "4", "--seed", "3"]


def answer(capsys):
    out = capsys.readouterr().out
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_generate_compare_json(tiny_folder, tmp_path, capsys):
    output = tmp_path / "clip.mp4"
    arguments = ["generate", "a red circle", "--model", str(tiny_folder), "--output", str(output), *SMALL]
    code = cli([*arguments, "--compare", "--json", "--pattern", "pooled", "--density", "0.5"])
    facts = answer(capsys)
    assert code == 0
    for key in ("output", "model", "seed", "steps", "frames", "width", "height", "tokens", "backend", "plan",
                "psnr", "ssim", "density", "density_overall"):  # fmt: skip
        assert key in facts
    for key in ("seconds", "dense_seconds", "speedup"):
        assert set(facts[key]) == {"total", "denoise", "attention"}
        assert all(value > 0 for value in facts[key].values())
    assert facts["seconds"]["attention"] <= facts["seconds"]["denoise"] <= facts["seconds"]["total"]
    assert facts["steps_run"] == {"dense": 1, "sparse": 3, "cached": 0, "region": 0}
    assert (facts["frames"], facts["tokens"], facts["seed"]) == (9, 396, 3)
    assert {p.name for p in tmp_path.iterdir()} == {"clip.mp4", "clip_dense.mp4", "clip_compare.mp4"}
    assert read_settings(output)["prompt"] == "a red circle"

    assert cli(["compare", str(output), str(tmp_path / "clip_dense.mp4"), "--json"]) == 0
    decoded = answer(capsys)
    assert len(decoded["psnr_per_frame"]) == 9 and decoded["identical"] is False


def test_repaint_json_and_summary(tiny_folder, tmp_path, capsys):
    clip, kept, new = tmp_path / "clip.gif", tmp_path / "clip.safetensors", tmp_path / "new.gif"
    arguments = ["generate", "a red circle", "--model", str(tiny_folder), "--output", str(clip), *SMALL]
    assert cli([*arguments, "--keep", str(kept)]) == 0
    assert f"kept: {kept}" in capsys.readouterr().out
    arguments = ["repaint", str(clip), "--mask", "0,0,96,80", "--prompt", "black", "--output", str(new)]
    assert cli([*arguments, "--kept", str(kept), "--json"]) == 0
    facts = answer(capsys)
    assert facts["psnr_outside"] == 100.0 and facts["steps_run"] == {"kept": 1, "all": 1, "masked": 2}
    assert set(facts["seconds"]) == {"total", "again", "denoise", "attention"} and read_settings(new) == facts
    assert facts["tokens_masked"] / facts["tokens"] == pytest.approx(facts["area"], rel=0.01)
    assert cli(arguments) == 0
    assert "outside the mask: PSNR 100.0 dB" in capsys.readouterr().out


def test_exact_speed_is_dense_and_repeatable(tiny_folder, tmp_path, capsys):
    arguments = ["generate", "a red circle", "--model", str(tiny_folder), *SMALL]
    assert cli([*arguments, "--output", str(tmp_path / "a.gif"), "--speed", "exact", "--compare", "--json"]) == 0
    facts = answer(capsys)
    assert facts["psnr"] == 100.0 and facts["density"] is None and facts["plan"] == "none"
    assert cli([*arguments, "--output", str(tmp_path / "b.gif"), "--plan", "none"]) == 0
    out = capsys.readouterr().out
    assert "4 dense steps" in out and "b.gif" in out
    assert cli(["compare", str(tmp_path / "a.gif"), str(tmp_path / "b.gif"), "--json"]) == 0
    assert answer(capsys)["identical"] is True


def test_every_speed_has_its_density(tiny_folder, tmp_path, capsys):
    densities = []
    for speed in ("fast", "balanced", "quality"):
        arguments = ["generate", "a", "--model", str(tiny_folder), "--output", str(tmp_path / "a.png"), "--json"]
        assert cli([*arguments, *SMALL, "--frames", "37", "--speed", speed]) == 0
        facts = answer(capsys)
        assert facts["steps_run"]["sparse"] == 3 and not facts["fallbacks"] and facts["request"]["speed"] == speed
        densities.append(facts["density"])
    assert densities == sorted(set(densities)) and densities[0] < 0.2 < densities[2]


def test_settings_in_the_files_are_those_of_each_clip(tiny_folder, tmp_path, capsys):
    output = tmp_path / "a.gif"
    arguments = ["generate", "a", "--model", str(tiny_folder), "--output", str(output), *SMALL, "--shift", "7"]
    assert cli([*arguments, "--compare", "--json", "--pattern", "pooled"]) == 0
    facts = answer(capsys)
    assert read_settings(output) == facts
    assert facts["request"]["shift"] == 7 and facts["request"]["pattern"] == "pooled"
    dense = read_settings(tmp_path / "a_dense.gif")
    assert dense["seconds"] == facts["dense_seconds"] and dense["density"] is None and dense["plan"] == "none"


def test_what_is_not_finite_is_no_clip(tiny_folder, tmp_path, capsys, monkeypatch):
    from diffusers import AutoencoderKLWan

    decode = AutoencoderKLWan.decode
    monkeypatch.setattr(AutoencoderKLWan, "decode", lambda *a, **k: [decode(*a, **k)[0] * float("nan")])
    arguments = ["generate", "a", "--model", str(tiny_folder), "--output", str(tmp_path / "a.gif"), *SMALL]
    assert cli(arguments) == 1
    assert "not finite" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("index", ["{}", "[]", '{"_class_name": "NoSuchPipeline"}', "not json"])
def test_broken_model_folders_are_told(tmp_path, capsys, index):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(index)
    output = tmp_path / "a.gif"
    assert cli(["generate", "a", "--model", str(tmp_path / "model"), "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert "cannot be loaded" in captured.err and "should not" not in captured.err and not output.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "  "], 2, "the prompt is empty"),
        (["generate", "a", "--steps", "0"], 2, "0 steps are not possible; allowed are 1 to 1000"),
        (["generate", "a", "--speed", "warp"], 2, "'warp' is unknown; allowed are exact"),
        (["generate", "a", "--speed", "fast", "--plan", "none"], 2, "--speed chooses the plan"),
        (["generate", "a", "--density", "0.2"], 2, "describe a --pattern"),
        (["generate", "a", "--nonsense"], 2, "No such option"),
        (["generate"], 2, "Missing argument"),
        (["generate", "a", "--cache", "quick"], 2, "the cache 'quick' is unknown; allowed are auto, none, easy"),
        (["generate", "a", "--cache", "easy", "--speed", "exact"], 2, "--speed exact computes everything"),
        (["generate", "a", "--model", "nowhere"], 1, "there is no model 'nowhere'; allowed are \"embedded\""),
        (["generate", "a", "--model", "someone/absent"], 1, "add --download"),
        (["generate", "a", "--plan", "missing.safetensors"], 1, "missing.safetensors"),
        (["generate", "a", "--output", "clip.avi"], 2, "must end in one of"),
        (["generate", "a", "--pattern", "magic"], 2, "'magic' is unknown; allowed are dense"),
        (["generate", "a", "--pattern", "pooled", "--density", "1.5"], 2, "above 0 and at most 1"),
        (["generate", "a", "--pattern", "pooled", "--tail", "long"], 2, "allowed are none, pooled"),
        (["generate", "a", "--pattern", "pooled", "--option", "colour=1"], 2, "no option 'colour'"),
        (["generate", "a", "--device", "gpu"], 1, "'gpu' is unknown; allowed are cpu"),
        (["generate", "a", "--device", "meta"], 1, "'meta' is not available here"),
        (["generate", "a", "--keep", "clip.pt"], 2, "must end in .safetensors"),
        (["repaint", "a.mp4", "--mask", "0,0,9,9", "--prompt", "a"], 1, "there is no file 'a.mp4'"),
        (["repaint", "a.mp4", "--mask", "0,0,9,9", "--prompt", "a", "--strength", "2"], 2, "above 0 and at most 1"),
        (["repaint", "a.mp4", "--mask", "0,0,9,9"], 2, "Missing option '--prompt'"),
        (["compare", "a.mp4", "b.mp4"], 1, "there is no file 'a.mp4'"),
        (["plan", "validate", "missing"], 1, "missing"),
    ],
)
def test_errors_are_one_sentence_with_the_right_code(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not list(tmp_path.iterdir())


def test_illegal_sizes_name_the_legal_ones(tiny_folder, tmp_path, capsys):
    arguments = ["generate", "a", "--model", str(tiny_folder), "--output", str(tmp_path / "a.mp4")]
    assert cli([*arguments, "--width", "70"]) == 2
    assert "multiples of 16" in capsys.readouterr().err
    assert cli([*arguments, "--frames", "10"]) == 2
    assert "multiples of 4 plus 1" in capsys.readouterr().err


def test_interruption(tiny_folder, tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pointillist.pipelines.generate.write_clips", stop)
    arguments = ["generate", "a", "--model", str(tiny_folder), "--output", str(tmp_path / "a.mp4"), *SMALL]
    assert cli(arguments) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_env(capsys):
    assert cli(["env", "--json"]) == 0
    facts = answer(capsys)
    assert facts["packages"]["torch"] and facts["machine"]["cores"] >= 1 and facts["backend"]["chosen"]


def test_plan_show_and_validate(tmp_path, capsys):
    path = tmp_path / "plan.safetensors"
    Plan.uniform("pooled", 0.25).save(path)
    assert cli(["plan", "validate", str(path)]) == 0
    capsys.readouterr()
    assert cli(["plan", "show", str(path), "--json"]) == 0
    assert answer(capsys)["block"] == 128


def test_an_interrupt_leaves_nothing_and_says_so(tiny_folder, tmp_path):
    output = tmp_path / "clip.mp4"
    command = [sys.executable, "-m", "pointillist", "generate", "a red circle", "--model", str(tiny_folder)]
    process = subprocess.Popen(
        [*command, "--output", str(output), "--width", "192", "--height", "176", "--frames", "9", "--steps", "1000"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "denoising 2/1000" in line:
            process.send_signal(signal.SIGINT)
            break
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 130, lines
    assert "Traceback" not in rest and "interrupted; no file is half-written" in rest and out == ""
    assert not list(tmp_path.iterdir())
