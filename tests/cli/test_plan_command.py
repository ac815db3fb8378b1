"""`pointillist plan`: show, validate, diff, with their exit codes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from pointillist import Plan
from pointillist.accel.patterns import PATTERNS
from pointillist.accel.plan import Rule, Stage
from pointillist.accel.schedule import Schedule
from pointillist.cli import plan as command
from pointillist.cli import run as cli
from search_records import made_up


def answer(capsys):
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture
def searched(tmp_path):
    """A plan, its record, and the file of both."""
    plan, record = made_up()
    record.save(plan, tmp_path / "plan.safetensors")
    return plan, record, tmp_path / "plan.safetensors"


def changed(plan, layer, head, rule):
    row = (*plan.table[layer][:head], rule, *plan.table[layer][head + 1 :])
    return replace(plan, table=(*plan.table[:layer], row, *plan.table[layer + 1 :]))


def test_show_is_a_map_with_figures(searched, capsys):
    plan, record, path = searched
    assert cli(["plan", "show", str(path)]) == 0
    out = capsys.readouterr().out
    letters = command._letters(plan)
    assert "sigma 0.9 to 0.55" in out and "sigma 0.55 to 0" in out and plan.model in out and "9×22×22" in out
    for row in plan.table:
        cells = [
            letters[rule.pattern] + ("" if rule.pattern in ("dense", "skip") else f"{100 * rule.density:.0f}")
            for rule in row
        ]
        assert any(line.split()[1:-1] == cells for line in out.splitlines()), cells
    assert "30.9" in out and "30.2" in out and "The search took 96.1 s" in out
    for point in record.points:
        assert f"{point.predicted_psnr:.1f} dB" in out


@pytest.mark.parametrize("size", [40, 100])
def test_large_tables_stay_within_the_terminal(tmp_path, capsys, size):
    plan, record = made_up(layers=40, heads=size, cells=2)
    plan = replace(plan, table=(*plan.table[:10], *plan.table[9:10] * 30))
    record.save(plan, tmp_path / "plan.safetensors")
    assert cli(["plan", "show", str(tmp_path / "plan.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 140
    (merged,) = (line for line in lines if line.strip().startswith("9–39"))
    letters = command._letters(plan)
    assert "".join(letters[rule.pattern] for rule in plan.table[9]) in merged.replace(" ", "")


def test_every_pattern_has_a_letter_of_its_own():
    plan = Plan("all", (tuple(Rule(name, 0.5) for name in PATTERNS),))
    assert len(set(command._letters(plan).values())) == len(PATTERNS)


def test_show_json_has_the_search(searched, tmp_path, capsys):
    plan, record, path = searched
    assert cli(["plan", "show", str(path), "--json"]) == 0
    facts = answer(capsys)
    assert facts["search"] == json.loads(json.dumps(record.facts())) and facts["block"] == plan.block
    assert facts["table"][1][2]["pattern"] == plan.table[1][2].pattern
    plan.save(tmp_path / "bare.safetensors")
    assert cli(["plan", "show", str(tmp_path / "bare.safetensors"), "--json"]) == 0
    assert answer(capsys)["search"] is None


def test_show_writes_reports(searched, tmp_path, capsys):
    _, _, path = searched
    targets = [str(tmp_path / "report.html"), str(tmp_path / "report.png")]
    assert cli(["plan", "show", str(path), "--html", targets[0], "--png", targets[1]]) == 0
    assert capsys.readouterr().out.split() == targets
    assert {each.name for each in tmp_path.iterdir()} == {"plan.safetensors", "report.html", "report.png"}
    Plan.uniform("window", 0.3).save(path)
    assert cli(["plan", "show", str(path), "--png", targets[1], "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["search"] is None and "the map alone" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "report.txt"], "must be a file that ends in .html"),
        (["--png", "report.html"], "must be a file that ends in .png"),
        (["--png", "absent/report.png"], "there is no folder 'absent'"),
        (["--html", "good.html", "--png", "absent/report.png"], "there is no folder 'absent'"),
    ],
)
def test_wrong_targets_are_told_before_anything_is_written(searched, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli(["plan", "show", str(searched[2]), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["plan.safetensors"]


def test_validate_reads_the_record_too(searched, tmp_path, capsys):
    plan, record, path = searched
    assert cli(["plan", "validate", str(path)]) == 0
    assert "with a record" in capsys.readouterr().out
    replace(record, boundaries=(1.0, 0.2, 0.6)).save(plan, path)
    assert cli(["plan", "validate", str(path)]) == 1
    assert "must descend from 1" in capsys.readouterr().err
    other, _ = made_up(layers=3)
    record.save(other, path)
    assert cli(["plan", "validate", str(path)]) == 1
    assert "has 3 layers; the model has 6" in capsys.readouterr().err
    Plan("odd", ((Rule("pooled", 0.2),) * 2, (Rule("pooled", 0.2),) * 3)).save(path)
    assert cli(["plan", "validate", str(path)]) == 1
    assert "neither 1 nor 3" in capsys.readouterr().err


def test_diff_of_equal_plans(searched, tmp_path, capsys):
    plan, _, path = searched
    plan.save(tmp_path / "again.safetensors")  # how it was found does not count
    assert cli(["plan", "diff", str(path), str(tmp_path / "again.safetensors")]) == 0
    assert capsys.readouterr().out == "the plans are equal\n"


def test_diff_names_heads_settings_and_figures(searched, tmp_path, capsys):
    plan, _, path = searched
    old = plan.table[2][1]
    new = Rule("radial", 0.15)
    other = replace(changed(plan, 2, 1, new), tail="none", measured={"psnr": 31.5})
    other.save(tmp_path / "other.safetensors")
    assert cli(["plan", "diff", str(path), str(tmp_path / "other.safetensors"), "--json"]) == 1
    facts = answer(capsys)
    assert facts["equal"] is False and facts["settings"] == {"tail": ["pooled", "none"]} and facts["shape"] is None
    (stage,) = facts["stages"]
    assert (stage["begin"], stage["end"], stage["differ"], stage["heads"]) == (0.9, 0.55, 1, 24)
    assert stage["how"] == {f"{old.pattern} → radial": 1}
    assert stage["density"][1] - stage["density"][0] == pytest.approx((0.15 - old.kept) / 24)
    assert facts["figures"] == {"measured psnr": [30.2, 31.5], "measured speedup": [2.1, None]}
    assert cli(["plan", "diff", str(path), str(tmp_path / "other.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "tail: pooled → none" in out and "1 of 24 heads differ" in out and "30.2 → 31.5" in out


def test_diff_lays_one_rule_over_a_table_and_tells_other_shapes(searched):
    plan, _, _ = searched
    uniform = Plan.uniform("moba", 0.5)
    stages = command.differences(uniform, plan)["stages"]
    assert [(stage["begin"], stage["differ"]) for stage in stages] == [(1.0, 1), (0.9, 24), (0.55, 24)]
    assert stages[0]["how"] == {"moba → dense": 1}
    denser = command.differences(uniform, Plan.uniform("moba", 0.6))["stages"]
    assert denser[0]["how"] == {"moba at another density": 1}
    other, _ = made_up(layers=7)
    assert command.differences(plan, other)["shape"] == [[6, 4], [7, 4]]


def test_diff_knows_plans_that_do_the_same(searched):
    plan, _, _ = searched
    dense = replace(plan, schedule=Schedule(dense_above=0.95))
    assert [stage["begin"] for stage in command.differences(plan, dense)["stages"]] == [0.95]
    again = replace(plan, stages=(*plan.stages, replace(plan.stages[-1], below=0.3)))
    assert again != plan and command.differences(plan, again)["equal"]


def test_diff_compares_each_transformer_with_its_own_tables():
    pooled, window, moba = (((Rule(name, 0.25),),) for name in ("pooled", "window", "moba"))
    a = Plan("p", pooled, (Stage(window, 0.5, "transformer_2"),))
    b = Plan("p", pooled, (Stage(moba, 0.5, "transformer_2"),))
    (stage,) = command.differences(a, b)["stages"]
    assert (stage["transformer"], stage["begin"], stage["how"]) == ("transformer_2", 0.5, {"window → moba": 1})
    (alone,) = command.differences(Plan("p", pooled), a)["stages"]  # a plan that names no transformer serves all
    assert (alone["transformer"], alone["how"]) == ("transformer_2", {"pooled → window": 1})


@pytest.mark.parametrize("arguments", [["missing", "plan"], ["plan", "missing"]])
def test_diff_of_what_is_no_plan_is_2(searched, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    searched[2].rename("plan")
    assert cli(["plan", "diff", *arguments]) == 2
    assert "there is no plan 'missing" in capsys.readouterr().err


def test_names_cannot_steer_the_terminal(tmp_path, capsys):
    replace(Plan.uniform("pooled", 0.2), name="\x1b[31m[red]x", hardware="\x1b]0;title\x07").save(tmp_path / "plan")
    assert cli(["plan", "show", str(tmp_path / "plan")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "[red]x" in out


def test_help_and_the_command_itself_import_no_torch_and_no_plotting():
    heavy = "{'torch', 'diffusers', 'plotly', 'matplotlib'}"
    for arguments, allowed in ((["plan", "show", "--help"], set()), (["plan", "show", "missing"], {"torch"})):
        code = (
            f"import sys; from pointillist.cli import run; run({arguments}); print(sorted({heavy} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert set(json.loads(done.stdout.splitlines()[-1].replace("'", '"'))) <= allowed
