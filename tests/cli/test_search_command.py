"""`pointillist search`: from the command line to a plan file, and what it refuses."""

import json

import pytest

from pointillist.accel.plan import Plan, Rule
from pointillist.accel.step_cache.table import CacheTable
from pointillist.cli import run
from pointillist.search.candidates import DENSE
from pointillist.search.sensitivity import REFERENCE

SMALL = ["--width", "64", "--height", "64", "--frames", "9", "--steps", "4", "--no-verify", "--no-cache"]


@pytest.fixture
def few_rules(monkeypatch):
    monkeypatch.setattr("pointillist.search.candidates.candidates", lambda: (DENSE, REFERENCE, Rule("skip", 1.0)))


@pytest.fixture
def machine(tmp_path):
    """A machine on which sparse attention pays at any length."""
    from dataclasses import replace

    from pointillist.hardware.profile import load_profile

    profile = replace(load_profile("ryzen-7700x"), name="eager", launch_us=0, row_us=0, gather_ps=0, memory_gbs=1e6)
    profile.save(tmp_path / "eager.json")
    return str(tmp_path / "eager.json")


def test_a_plan_is_made_shown_and_used_again(tiny_folder, tmp_path, machine, few_rules, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n a circle on black \na red circle\n")
    output = tmp_path / "mine.safetensors"
    words = ["search", "--model", str(tiny_folder), "--hardware", machine, "--prompts", str(prompts), *SMALL]
    assert run([*words, "--output", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    plan = Plan.load(output)
    assert plan.hardware == "eager" and facts["predicted"] == plan.predicted and facts["measured"] == {}
    assert run(["plan", "show", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["search"]["settings"]["prompts"] == 2

    folder = tmp_path / "parts"
    for shard in ("1/2", "2/2"):
        words_of_shard = [*words, "--shard", shard, "--folder", str(folder), "--output", str(output)]
        assert run(words_of_shard) == 0
    assert run([*words_of_shard, "--stages"]) == 2
    assert "other shards in" in capsys.readouterr().err
    (tmp_path / "merged").mkdir()
    merged = tmp_path / "merged" / "mine.safetensors"  # a plan has the name of its file
    assert run(["search", "merge", str(folder), "--output", str(merged)]) == 0
    assert run(["plan", "diff", str(output), str(merged)]) == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "--output is missing"),
        (["--output", "plan.txt"], 2, "must be a FILE.safetensors"),
        (["--output", "nowhere/plan.safetensors"], 2, "there is no folder 'nowhere'"),
        (["--output", "p.safetensors", "--target-speedup", "2", "--min-psnr", "30"], 2, "exclude each other"),
        (["--output", "p.safetensors", "--shard", "4/3"], 2, "must be i/n"),
        (["--output", "p.safetensors", "--speed", "warp"], 2, "allowed are quality, balanced, fast"),
        (["--output", "p.safetensors", "--prompts", "absent.txt"], 2, "/absent.txt'; give a text file with one prompt"),
        (["--output", "p.safetensors", "--hardware", "abacus"], 2, "there is no hardware profile 'abacus'"),
        (["--output", "t.safetensors", "--cache-table"], 2, "must be a FILE.json"),
        (["--output", "t.safetensors", "--share", "0.5"], 2, "say how a --cache-table is learned"),
        (["--output", "t.json", "--cache-table", "--stages"], 2, "are of plans, not of a --cache-table"),
        (["--output", "t.json", "--cache-table", "--share", "1.5"], 1, "the share of reused modules is 1.5"),
        (["--output", "t.json", "--cache-table", "--share", "0.5", "--beta", "1"], 1, "give one of them"),
        (["merge", "absent", "--output", "p.safetensors"], 1, "absent holds no search"),
    ],
)
def test_bad_input_is_one_sentence(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["search", *words]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompt"), (b"\n \n", "holds no prompt"), (b"\xff\xfe\x00", "is not text in UTF-8")],
)
def test_prompts_that_are_none(content, message, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes(content)
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "p.safetensors")]
    assert run(["search", *words]) == 2
    assert message in capsys.readouterr().err


def test_too_many_prompts(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(10_000)))
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "p.safetensors")]
    assert run(["search", *words]) == 2
    assert "10000 prompts; allowed are up to 64" in capsys.readouterr().err


def test_a_cache_table_is_learned(tiny_folder, tmp_path, capsys):
    """Measured, without iterations; then trained on from what was kept."""
    output = tmp_path / "table.json"
    size = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "3"]
    words = ["search", "--cache-table", "--model", str(tiny_folder), *size, "--output", str(output), "--json"]
    for more in ([], ["--iterations", "1"]):
        assert run([*words, *more]) == 0
        assert json.loads(capsys.readouterr().out)["share"] == 0.5
        table = CacheTable.load(output)
        assert (table.steps, table.layers, table.share) == (3, 2, 0.5)
