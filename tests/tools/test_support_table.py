"""The table of the documentation is what the tests found, and of the tests that are here."""

import ast
import json

import support_table
from families import PIPELINES, WITHOUT
from pointillist.accel.models import FAMILIES
from pointillist.accel.models.family import Preset


def results():
    return json.loads(support_table.RESULTS.read_text())


def test_the_page_shows_the_results():
    page = support_table.PAGE.read_text()
    assert support_table.in_page(page, results()) == page
    for name in ("support table", "presets"):
        assert page.count(support_table.BEGIN.format(name)) == page.count(support_table.END.format(name)) == 1


def test_every_pipeline_has_its_row():
    found = results()
    assert [row["name"] for row in found["rows"]] == [*PIPELINES, *WITHOUT]
    assert {row["family"] for row in found["rows"]} >= {family.NAME for family in FAMILIES}
    assert found["green"] == sum(row["sparse"] == "yes" for row in found["rows"]) >= 16
    assert not [row for row in found["rows"] if {"fails", "not tried"} & set(row.values())]


def test_columns_stand_for_tests_that_exist():
    defined = {
        node.name
        for file in support_table.TESTS
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {test for tests in support_table.COLUMNS.values() for test in tests} <= defined


def test_what_a_run_says_becomes_a_cell(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text(
        "<testsuite>"
        '<testcase name="test_steps_are_cached[wan]"/>'
        '<testcase name="test_steps_are_cached[wan-vace]"><failure/></testcase>'
        '<testcase name="test_offloading[group_offload-wan]"/><testcase name="test_offloading[wan-leaf_offload]"/>'
        '<testcase name="test_regions[mochi]"><skipped message="whole steps only"/></testcase>'
        '<testcase name="test_what_has_no_sparse_attention_says_why[sana]"/>'
        "</testsuite>"
    )
    found = support_table.outcomes(junit)
    cells = [("cache", "wan"), ("cache", "wan-vace"), ("offload", "wan"), ("regions", "mochi"), ("sparse", "sana")]
    assert [support_table.cell(found, *each) for each in cells] == ["yes", "fails", "yes", "whole steps only", "no"]
    assert support_table.cell(found, "compile", "flux") == "not tried"


def test_the_page_gives_the_presets_as_they_are():
    lines = support_table.PAGE.read_text().splitlines()
    for family in FAMILIES:
        preset: Preset = family.PRESET
        line = next((line for line in lines if line.startswith("|") and family.NAME in line.split("|")[1]), None)
        line = line or next(line for line in lines if "all other image models" in line)
        cells = [cell.strip() for cell in line.split("|")[2:5]]
        assert cells == [str(preset.density), str(preset.dense_above), str(preset.min_tokens)], family.NAME
