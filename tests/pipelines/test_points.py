"""The points of a search as files, searches in a folder, and what plans do in the steps of a clip."""

import json
import shutil
from dataclasses import replace

import pytest

from pointillist.accel.plan import Plan, PlanError, Rule
from pointillist.accel.schedule import Schedule
from pointillist.pipelines.generate import GenerateRequest
from pointillist.pipelines.plan_views import Planned, plan_of, shipped, views_of
from pointillist.pipelines.points import read_points, write_points
from pointillist.pipelines.searches import Searches
from pointillist.search.errors import SearchError
from search_records import made_up


def test_points_are_plans(tmp_path):
    plan, record = made_up()
    curve = tuple((point, replace(plan, name=f"plan {i}")) for i, point in enumerate(record.points))
    write_points(tmp_path, curve)
    found = read_points(tmp_path)
    assert [point for point, _ in found] == list(record.points)
    assert [Plan.load(path) for _, path in found] == [plan for _, plan in curve]
    write_points(tmp_path, curve[:2])  # as many as there are now, no more
    assert [point for point, _ in read_points(tmp_path)] == list(record.points[:2])
    found[0][1].write_bytes(b"no point")
    with pytest.raises(PlanError, match="is no point of a search"):
        read_points(tmp_path)
    assert read_points(tmp_path / "nowhere") == []


def test_searches_are_named_by_nobody_and_go_on(tmp_path):
    searches = Searches(tmp_path)
    request = searches.new(target_speedup=1.5, width=64, height=64)
    assert searches.names == [request.folder.name] and searches.folder_of(request.folder.name) == request.folder
    assert searches.request(request.folder.name) == request
    assert "1.5×" in searches.title(request.folder.name) and "not finished" in searches.title(request.folder.name)
    request.output.write_bytes(b"a plan")
    assert "not finished" not in searches.title(request.folder.name)
    for name in ("", "..", "../x", str(tmp_path), "20260101-000000-0123456g", f"{request.folder.name}/.."):
        assert searches.folder_of(name) is None
        with pytest.raises(SearchError, match="there is no search"):
            searches.request(name)
    (tmp_path / "20260101-000000-01234567").symlink_to(tmp_path.parent)
    assert searches.folder_of("20260101-000000-01234567") is None
    (request.folder / "asked.json").write_text(json.dumps({"width": 64, "output": "/etc/passwd"}))
    with pytest.raises(SearchError, match="cannot be read"):
        searches.request(request.folder.name)
    shutil.rmtree(request.folder)


SIGMAS = (1.0, 0.86, 0.6, 0.01)


def facts(**changes):
    sites = {f"transformer.blocks.{layer}.attn1": {"dense": 1.0} for layer in range(6)}
    given = {
        "kinds": ["dense", "sparse", "cached", "sparse"], "sigmas": SIGMAS, "grid": [9, 22, 22], "heads": 4,
        "call_ms": sites, "steps": 4, "plan": "balanced",
    }  # fmt: skip
    return {**given, **changes}


def test_a_map_for_every_step_of_a_clip():
    plan, record = made_up(boundaries=(1.0, 0.9, 0.5))
    views = views_of(facts(), Planned(plan, record))
    assert [view.kind for view in views] == facts()["kinds"]
    assert {rule for row in views[0].phase.table for rule in row} == {Rule("dense", 1.0)}
    assert views[1].phase.table == plan.table and views[1].phase.buckets == (1,)
    assert views[3].phase.table == plan.stages[0].table and views[3].phase.buckets == (2,)


def test_on_a_smaller_grid_heads_keep_more():
    plan, _ = made_up()
    views = views_of(facts(grid=[3, 11, 11]), Planned(plan))
    for row, before in zip(views[1].phase.table, plan.table, strict=True):
        assert row == plan.carried(before, 363) and all(a.kept >= b.kept for a, b in zip(row, before, strict=True))


def test_one_rule_stands_for_all_heads_and_none_is_dense():
    uniform = Planned(Plan.uniform("pooled", 0.3))
    table = views_of(facts(), uniform)[1].phase.table
    assert len(table) == 6 and set(table) == {(Rule("pooled", 0.3),) * 4}
    assert all(rule.pattern == "dense" for view in views_of(facts(), None) for rule in view.phase.rules)


def test_the_plan_of_a_clip_is_found_again(tmp_path):
    plan, record = made_up()
    record.save(plan, tmp_path / "mine.safetensors")
    found = plan_of(facts(), GenerateRequest("x", plan=str(tmp_path / "mine.safetensors")))
    assert found.plan == plan and found.record.points == record.points
    (tmp_path / "mine.safetensors").unlink()
    assert plan_of(facts(), GenerateRequest("x", plan=str(tmp_path / "mine.safetensors"))) is None
    assert plan_of(facts(plan="none"), GenerateRequest("x", speed="exact")) is None
    assert plan_of(facts(plan="embedded-balanced"), GenerateRequest("x")).plan.name == "embedded-balanced"
    uniform = plan_of(facts(), GenerateRequest("x", pattern="window", density=0.2)).plan
    assert uniform.table == ((Rule("window", 0.2),),) and uniform.schedule == Schedule(dense_steps=1)
    assert {"embedded-quality", "embedded-balanced", "embedded-fast"} <= set(shipped())
    assert shipped("another model") == {}
