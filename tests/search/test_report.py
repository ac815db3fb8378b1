"""What a search's record holds is what its report shows; broken records are refused; pages load nothing."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from pointillist import Plan, PlanError
from pointillist.accel.plan import Rule, Stage
from pointillist.accel.schedule import Schedule
from pointillist.search import report
from pointillist.search.record import KEY, TENSORS, SearchRecord
from search_records import made_up


class Page(HTMLParser):
    """What a page says, what it loads or links to, and the JSON of its figures."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.addresses, self.scripts, self._inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        (self.scripts if self._inside == "script" else self.texts).append(data)


def test_round_trip(tmp_path):
    plan, record = made_up()
    record.save(plan, tmp_path / "plan.safetensors")
    read = SearchRecord.load(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan
    assert read.facts() == record.facts()
    for name in TENSORS:
        assert np.array_equal(getattr(read, name), getattr(record, name))
    plan.save(tmp_path / "bare.safetensors")
    assert SearchRecord.load(tmp_path / "bare.safetensors") is None


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_record_none_or_a_plan_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("records") / "plan.safetensors"
    plan, record = made_up(layers=2, heads=2, cells=4, seed=0)
    record.save(plan, path)
    content = bytearray(path.read_bytes())
    end = data.draw(st.sampled_from((len(content), 8 + int.from_bytes(content[:8], "little"))))  # or the header alone
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else content)
    try:
        read = SearchRecord.load(path)
        assert read is None or json.dumps(read.facts(), allow_nan=False)
    except PlanError:
        pass


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_values_give_a_record_that_can_be_shown_or_a_plan_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("records") / "plan.safetensors"
    plan, record = made_up(layers=2, heads=2, cells=4, seed=0)
    record.save(plan, path)
    with safe_open(path, framework="np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    odd = st.one_of(
        st.none(), st.booleans(), st.text(max_size=5), st.integers(-(10**320), 10**320), st.lists(st.floats()),
        st.floats(), st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
    )  # fmt: skip
    values = json.loads(metadata[KEY])
    place = data.draw(st.sampled_from([*values, "a point", "a boundary", "a phase"]))
    if place == "a point":
        values["points"][0][data.draw(st.sampled_from([*values["points"][0], "other"]))] = data.draw(odd)
    elif place == "a boundary":
        values["boundaries"][data.draw(st.integers(0, 2))] = data.draw(odd)
    elif place == "a phase":
        values["seconds"]["errors"] = data.draw(odd)
    else:
        values[place] = data.draw(odd)
    save_file(tensors, path, {**metadata, KEY: json.dumps(values)})
    try:
        read = SearchRecord.load(path)
    except PlanError:
        return
    shown = report.examples(plan, read)
    assert report.headline(plan, read) and report.about_map(plan, read) and report.about_examples(shown)
    assert report.about_points(read) and report.about_layers(plan, read) and report.about_cost(read)
    json.dumps(read.facts(), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("errors", lambda each: each[:, :1]),
        ("sensitivity", lambda each: each * np.nan),
        ("dense_seconds", lambda each: each[:0]),
        ("plan_seconds", lambda each: -each),
        ("true_maps", lambda each: each[..., :3]),
        ("kept_maps", lambda each: (each > 0).astype(np.uint8)),
    ],
)
def test_broken_arrays_are_named(tmp_path, name, spoil):
    plan, record = made_up()
    replace(record, **{name: spoil(getattr(record, name))}).save(plan, tmp_path / "plan.safetensors")
    with pytest.raises(PlanError, match="broken record of its search"):
        SearchRecord.load(tmp_path / "plan.safetensors")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_json_cannot_hold_is_refused(tmp_path, number):
    plan, record = made_up(cells=4)
    text = json.dumps(record.facts()).replace('"prompts": 8', f'"prompts": {number}')
    tensors = {name: getattr(record, name) for name in TENSORS}
    save_file(tensors, tmp_path / "plan", {"pointillist.plan": plan.to_json(), KEY: text})
    with pytest.raises(PlanError, match=r"cannot read how .* was found"):
        SearchRecord.load(tmp_path / "plan")


def test_phases_are_what_the_plan_does_at_every_sigma():
    plan, record = made_up(layers=3, heads=5, boundaries=(1.0, 0.8, 0.6, 0.3))
    runs = report.phases(plan, record)
    assert [(run.begin, run.end, run.buckets) for run in runs] == [(0.8, 0.6, (1,)), (0.6, 0.3, (2,)), (0.3, 0.0, (3,))]
    for share in np.random.default_rng().uniform(0.001, 0.8, 20):
        run = next(run for run in runs if run.end < share <= run.begin)
        assert all(run.table[layer] == plan.rules(layer, share) for layer in range(3))


def test_neighbouring_phases_that_do_the_same_are_one():
    pooled, window = ((Rule("pooled", 0.2),),), ((Rule("window", 0.3),),)
    plan = Plan("p", pooled, (Stage(pooled, 0.5), Stage(window, 0.2)))
    assert [(run.begin, run.end) for run in report.phases(plan)] == [(1.0, 0.2), (0.2, 0.0)]
    experts = Plan("p", pooled, (Stage(window, 0.9, "transformer_2"),))
    assert [(run.transformer, run.begin) for run in report.phases(experts)] == [
        ("", 1.0),
        ("transformer_2", 1.0),
        ("transformer_2", 0.9),
    ]


def test_a_plan_without_sparse_steps_is_one_dense_phase():
    plan = Plan("p", ((Rule("pooled", 0.2),),), schedule=Schedule(dense_above=0.0))
    (run,) = report.phases(plan)
    assert run.kept.tolist() == [[1.0]] and run.title == "all steps"


def test_a_record_of_another_model_is_refused():
    plan, _ = made_up(layers=3)
    _, record = made_up(layers=4)
    with pytest.raises(PlanError, match="has 3 layers; the model has 4"):
        report.phases(plan, record)


def test_examples_have_the_worst_error_and_the_least_of_sparse_heads_and_different_patterns():
    plan, record = made_up(layers=8, heads=6)
    shown = report.examples(plan, record)
    error, runs = record.errors.astype(float).mean(0), report.phases(plan, record)
    sparse = [error[i, j] for i, j in np.ndindex(8, 6) if all(run.table[i][j].kept < 1 for run in runs)]
    assert shown[0].error == pytest.approx(max(sparse)) and shown[1].error == pytest.approx(min(sparse))
    assert len({(each.layer, each.head) for each in shown}) == len(shown) == 4
    for each in shown:
        true_map, kept = record.true_maps[each.layer, each.head], record.kept_maps[each.layer, each.head]
        assert each.recall == pytest.approx((true_map.astype(float) * kept).sum(-1).mean(), abs=1e-3)
        assert each.density == pytest.approx(kept.astype(float).mean(), abs=1e-6)


def test_the_page_shows_the_records_numbers_and_loads_nothing(tmp_path):
    plan, record = made_up()
    report.write_html(plan, record, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses == [] and "default-src 'none'" in text
    assert not re.search(r"url\(\s*['\"]?http|@import", "".join(page.texts))
    figures = "".join(script for script in page.scripts if "Plotly.newPlot" in script and len(script) < 1e6)
    assert figures.count("Plotly.newPlot(") == 5 and not re.search(r"\bNaN\b|\bInfinity\b|\bundefined\b", figures)
    point = report.chosen_point(record)
    words = " ".join(page.texts)
    assert f"{point.measured_psnr:.1f} dB" in words and f"{point.measured_speedup:.2f}×" in words
    assert "96.1 s" in words and "10.3" in words and all(name in words for name in plan.patterns)
    for run in report.phases(plan, record):
        error = record.errors[list(run.buckets), 2, 3].mean()
        assert f"predicted error {error:.3g}" in figures
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_names_from_a_file_are_text_and_nothing_else(tmp_path):
    plan, record = made_up()
    evil = '$\\frac{$<script>alert(1)</script><img src="http://x.example/">'
    plan = replace(plan, name=evil, model=evil, predicted={evil: 1.0}, hardware=evil)
    point = replace(record.points[4], name=evil)
    record = replace(record, points=(*record.points[:4], point), seconds={evil: 1.0}, settings={evil: evil})
    report.write_html(plan, record, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in text and "<script>alert" not in text and "<img src" not in text
    report.write_png(plan, record, tmp_path / "report.png")


@pytest.mark.parametrize("with_record", [True, False])
def test_the_picture(tmp_path, with_record):
    plan, record = made_up()
    report.write_png(plan, record if with_record else None, tmp_path / "report.png")
    picture = Image.open(tmp_path / "report.png")
    assert picture.size == (1600, 1000)
    seen = {tuple(colour[:3]) for _, colour in picture.convert("RGB").getcolors(1600 * 1000)}
    dense = report.FIXED_COLOURS["dense"]
    assert tuple(int(dense[at : at + 2], 16) for at in (1, 3, 5)) in seen or "dense" not in plan.patterns


@pytest.mark.parametrize("layers", [1, 40])
def test_reports_of_any_size(tmp_path, layers):
    boundaries = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2)
    plan, record = made_up(layers=layers, heads=layers, boundaries=boundaries, cells=9)
    report.write_png(plan, record, tmp_path / "report.png")
    report.write_html(plan, record, tmp_path / "report.html")
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).addresses == []


def test_a_page_without_a_record_says_why_the_rest_is_absent(tmp_path):
    report.write_html(Plan.uniform("pooled", 0.25), None, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    words = " ".join(page.texts)
    assert report.NO_RECORD in words and "pooled, density 0.25" in words
    assert sum("Plotly.newPlot(" in script and len(script) < 1e6 for script in page.scripts) == 1


def test_a_record_with_nothing_measured_is_shown(tmp_path):
    plan, record = made_up()
    bare = tuple(replace(point, measured_speedup=None, measured_psnr=None, chosen=False) for point in record.points)
    for points in (bare, ()):
        changed = replace(record, points=points, seconds={})
        report.write_html(plan, changed, tmp_path / "report.html")
        report.write_png(plan, changed, tmp_path / "report.png")
    assert "9 plans were predicted, 0 of them measured." in report.about_points(replace(record, points=bare))


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    plan, record = made_up(layers=1, heads=1)
    (tmp_path / "report.png").write_bytes(b"before")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_png(plan, record, tmp_path / "report.png")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    assert (tmp_path / "report.png").read_bytes() == b"before"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs plotly: pip install 'pointillist\[search\]'"):
        report.write_html(Plan.uniform("pooled", 0.25), None, tmp_path / "report.html")
    with pytest.raises(ValueError, match="needs matplotlib: pip install"):
        report.write_png(Plan.uniform("pooled", 0.25), None, tmp_path / "report.png")


@pytest.mark.parametrize(
    ("seconds", "text"), [(4e-5, "40 µs"), (4.12e-3, "4.12 ms"), (85, "85 s"), (720, "12 min"), (11520, "3.2 h")]
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text
