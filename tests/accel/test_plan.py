"""Plan files: what is written is read; anything else is a PlanError."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pointillist import Plan, PlanError
from pointillist.accel.plan import Choice
from pointillist.accel.schedule import Schedule

PLAN = Plan(
    (Choice("pooled", 0.2, "pooled"), Choice("window", 0.3, "pooled")),
    Schedule(dense_steps=1, dense_above=0.9),
    assignment=((0, 1), (1, 1), (0, 0)),
    block=64,
    name="mine",
    model="wan/x",
    grid=(9, 8, 8),
    facts={"hardware": "cpu"},
)


def test_round_trip(tmp_path):
    PLAN.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]
    Plan.uniform("pooled", 0.5).save(tmp_path / "uniform.safetensors")
    assert Plan.load(tmp_path / "uniform.safetensors") == Plan.uniform("pooled", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": [{"pattern": "magic", "density": 0.5, "tail": "none"}]}, "'magic' is unknown; allowed are dense"),
        ({"choices": [{"pattern": "pooled", "density": 1.5, "tail": "none"}]}, "density 1.5"),
        ({"choices": [{"pattern": "pooled", "density": True, "tail": "none"}]}, "density True"),
        ({"choices": []}, "1 to 4096 choices"),
        ({"schema": 99}, "this version reads 1"),
        ({"block": 3}, "block 3"),
        ({"grid": [1, 2]}, "grid"),
        ({"schedule": {"dense_steps": -1, "dense_above": None}}, "dense_steps -1"),
        ({"facts": 3}, "wrong type"),
    ],
)
def test_foreign_values_are_refused(tmp_path, change, message):
    header = {
        "schema": 1, "choices": [{"pattern": "pooled", "density": 0.5, "tail": "none"}], "block": 128, "name": "x",
        "schedule": {"dense_steps": 0, "dense_above": None}, "model": None, "grid": None, "facts": {},
    }  # fmt: skip
    path = tmp_path / "plan.safetensors"
    tensors = {"assignment": torch.zeros(0, 0, dtype=torch.int32)}
    save_file(tensors, path, metadata={"pointillist_plan": json.dumps(header)})
    Plan.load(path)
    save_file(tensors, path, metadata={"pointillist_plan": json.dumps({**header, **change})})
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_an_assignment_outside_the_table_is_refused():
    with pytest.raises(PlanError, match="outside 0 to 0"):
        Plan((Choice("pooled", 0.5, "none"),), assignment=((0, 1),))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_plan_or_a_plan_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    PLAN.save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else content)
    try:
        assert isinstance(Plan.load(path), Plan)
    except PlanError:
        pass


def test_schedule_carries_over_to_any_step_count():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shares = []
    for steps in (10, 20, 50):
        scheduler.set_timesteps(steps)
        sigmas = tuple(float(s) for s in scheduler.sigmas[:steps])
        shares.append(sum(Schedule(dense_above=0.95).is_dense(i, sigmas) for i in range(steps)) / steps)
    assert shares == [0.2, 0.15, 0.14]
    assert not Schedule().is_dense(0, (1.0, 0.5))
