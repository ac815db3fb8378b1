"""What the charts say is what they are given, and text that is not ours stays text."""

import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("gradio")

from pointillist.pipelines.inspect import Seen
from pointillist.pipelines.plan_views import Planned
from pointillist.web import charts, pictures
from pointillist.web.pick import picked, place_in
from search_records import made_up

EVIL = "<script>alert(1)</script>"


class Click:
    def __init__(self, **data):
        self.__dict__.update(data)


def test_the_map_has_every_head_and_its_density():
    plan, record = made_up()
    view = Planned(plan, record).views[0]
    drawn = charts.plan_map(view, Planned(plan, record), "pattern", (2, 1))
    assert re.findall(r'data-pick="(\d+),(\d+)"', drawn) == [(str(i), str(j)) for i in range(6) for j in range(4)]
    numbers = [int(text) for text in re.findall(r'">(\d+)</button>', drawn)]
    assert numbers == [round(100 * rule.kept) for row in view.phase.table for rule in row]
    assert re.findall(r'class="on" data-pick="(.*?)"', drawn) == ["2,1"]
    assert all(f">{rule.pattern}<" in drawn or f"{rule.pattern}</span>" in drawn for rule in view.phase.rules)
    many, _ = made_up(layers=20, heads=24)
    assert 'class="map many"' in charts.plan_map(Planned(many).views[0], Planned(many), "density")


def test_a_reused_step_is_not_coloured():
    plan, _ = made_up()
    view = replace(Planned(plan).views[0], kind="cached")
    assert "reuses what others gave" in charts.plan_map(view, Planned(plan), "pattern")


def test_steps_are_as_high_as_they_are_long():
    drawn = charts.steps_chart(["dense", "cached", "sparse"], [2.0, 0.0, 1.0], 2)
    assert re.findall(r"height:([\d.]+)px", drawn) == ["66.0", "0.0", "33.0"]
    assert "reused 1" in drawn and drawn.count("class=on") == 1


def test_the_curve_has_every_point_and_nothing_else():
    _, record = made_up()
    points = [replace(point, name=EVIL) for point in record.points]
    drawn = charts.curve(points, 4)
    assert set(re.findall(r'data-pick="(\d+)"', drawn)) == {str(i) for i in range(len(points))}
    assert drawn.count('class="run"') == 3 and drawn.count('class="ring"') == 1 and EVIL not in drawn
    inside = [tuple(map(float, place)) for place in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn)]
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in inside)
    assert "appears when" in charts.curve([])
    charts.curve(points[:1])  # one point has an axis too


def test_the_bill_names_what_it_has():
    drawn = charts.bill([{"dense": 2.0, "sparse": 0.5}, {"dense": 1.0}], EVIL, EVIL)
    assert EVIL not in drawn and "2 / 0.5 ms" in drawn and re.findall(r"width:([\d.]+)%", drawn) == [
        "100.0", "25.0", "50.0"
    ]  # fmt: skip


def test_a_film_tells_where_the_token_is_and_what_it_keeps():
    weights = np.zeros((2, 4, 5), np.float32)
    weights[0, 1, 2], weights[1, 3, 4] = 0.75, 0.25
    kept = np.zeros((2, 4, 5), bool)
    kept[0] = True
    drawn = pictures.film(np.zeros((2, 32, 40, 3), np.uint8), Seen(weights, kept), 39)
    assert "latent frame 1, row 3, column 4" in drawn and "75% of its attention, 100% kept" in drawn
    assert "keeps 50% of the tokens for it, with 75% of its" in drawn and drawn.count("<img") == 2
    pair = pictures.head_pair(np.full((6, 6), 1.0), np.eye(6), 3)
    assert "17% of the pairs, about 17% of the attention" in pair


@pytest.mark.parametrize("sent", [None, "", "1", "1,2,3", "-1,2", "1,²", "1e3,0", "999999999,0", ["1", "2"]])
def test_whatever_a_browser_sends(sent):
    assert picked(Click(pick=sent), 2) is None and picked(Click(), 2) is None
    assert picked(Click(pick="3,12"), 2) == (3, 12)


def test_places_stay_inside():
    assert place_in(Click(x=0.999, y=0.0), 8, 4) == (7, 0) and place_in(Click(x=1.0, y=1.0), 8, 4) == (7, 3)
    for wrong in (-1, 2, "0.5", None, float("nan"), True):
        assert place_in(Click(x=wrong, y=wrong), 8, 4) in ((0, 0), (7, 3))
