"""Heads over processes."""

from pathlib import Path

import pytest

from pointillist.accel.parallel.balance import balance_of, head_costs, head_counts, imbalance, spread
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.regions.policy import Regions
from pointillist.accel.schedule import Schedule

PLANS = Path(__file__).parents[3] / "pointillist" / "accel" / "plans"


def test_the_costliest_head_goes_where_least_is_to_do():
    assert spread([4, 3, 2, 1], 2) == (0, 3, 1, 2)
    assert imbalance([4, 3, 2, 1], range(4), 2) == pytest.approx(7 / 5)
    assert imbalance([4, 3, 2, 1], (0, 3, 1, 2), 2) == 1


def test_every_head_is_somewhere_once_and_every_process_has_its_number():
    costs = [0.1 * (7 * head % 11) for head in range(11)]
    order = spread(costs, 4)
    assert sorted(order) == list(range(11))
    assert head_counts(11, 4) == [3, 3, 3, 2]


def test_equal_heads_stay_where_they_are():
    assert spread([0.3] * 6, 3) == tuple(range(6))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_spreading_never_makes_it_worse(processes):
    for salt in range(40):
        costs = [((13 * head + 7 * salt) * 37 % 101) / 100 + 0.01 for head in range(12)]
        assert imbalance(costs, spread(costs, processes), processes) <= imbalance(costs, range(12), processes)


def test_heads_that_cannot_be_spread_are_refused_with_what_can():
    with pytest.raises(ValueError, match=r"4 heads cannot be spread over 8 processes \(ulysses\); possible are 2, 4"):
        head_counts(4, 8)


def test_costs_are_the_pairs_of_all_steps_but_those_that_reuse():
    rules = (Rule("tile", 0.2), Rule("dense", 1.0), Rule("skip", 0.5))
    plan = Plan(name="p", table=(rules,), schedule=Schedule(dense_steps=1))
    dense, sparse = 1, 3
    costs = head_costs(plan, 0, 3, "transformer", (1.0, 0.75, 0.5, 0.25))
    overhead = costs[2] - dense
    assert costs == pytest.approx([dense + sparse * 0.2 + overhead, dense + sparse + overhead, dense + overhead])


def test_region_steps_cost_each_head_a_part_of_a_dense_one():
    plan = Plan(
        "x", ((Rule("tile", 0.2), Rule("tile", 0.6)),), regions=Regions(0.25),
        schedule=Schedule(computed=(1.0, 0.5), region_after=(0.5,)),
    )  # fmt: skip
    costs = head_costs(plan, 0, 2, "transformer", (1.0, 0.75, 0.5, 0.25))  # sparse, reused, sparse, region
    assert costs == pytest.approx([2 * 0.22 + 0.27, 2 * 0.62 + 0.27])


@pytest.mark.parametrize("path", sorted(PLANS.glob("embedded-*.safetensors")), ids=lambda path: path.stem)
def test_shipped_plans_are_balanced(path):
    found = balance_of(Plan.load(path), layers=6, heads=4, processes=2, transformer="transformer")
    assert 1 <= found.after <= found.before < 1.2
    assert balance_of(Plan.load(path), 6, 4, 4, "transformer").after >= found.after
