"""Plan files: what is written is read; anything else is a PlanError."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist import Plan, PlanError
from pointillist.accel import plans
from pointillist.accel.choose_plan import shipped_plans
from pointillist.accel.models.wan import Wan
from pointillist.accel.patterns import PATTERNS
from pointillist.accel.plan import Rule, Stage
from pointillist.accel.schedule import Schedule
from pointillist.search.record import SearchRecord

PLAN = Plan(
    name="mine",
    table=(
        (Rule("pooled", 0.2, (("order", "gilbert"), ("rule", "mass"))), Rule("window", 0.3)),
        (Rule("dense", 1.0), Rule("dense", 1.0)),
    ),
    stages=(Stage(((Rule("skip", 0.5),),), below=0.4), Stage(((Rule("window", 0.5),),), 0.5, "transformer_2")),
    tail="pooled",
    schedule=Schedule(dense_steps=1, dense_above=0.9),
    block=64,
    dense_first_frame=True,
    model="wan-x",
    grid=(9, 8, 8),
    hardware="cpu",
    measured={"psnr": 30.5},
)


def test_round_trip(tmp_path):
    PLAN.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": [[{"pattern": "magic", "density": 0.5}]]}, "'magic' is unknown; allowed are dense"),
        ({"table": [[{"pattern": "pooled", "density": 1.5}]]}, "1.5"),
        ({"table": [[{"pattern": "pooled", "density": True}]]}, "True"),
        ({"table": [[{"pattern": "pooled", "density": 10**400}]]}, "density"),
        ({"measured": {"psnr": 10**400}}, "numbers"),
        ({"table": []}, "rows"),
        ({"table": 3}, "wrong kind"),
        ({"tail": "long"}, "tail 'long' is unknown; allowed are none, pooled"),
        ({"quantized": "int3"}, "quantized"),
        ({"hoist": []}, "hoist"),
        ({"residual": 1}, "residual"),
        ({"table": [[{"pattern": "sla", "density": 0.5}]], "residual": True}, "adds a trained part"),
        ({"table": [[{"pattern": "vsa", "density": 0.5}]], "tail": "rescaled"}, "adds a trained part"),
        (
            {"table": [[{"pattern": "pyramid", "density": 0.5, "options": {"levels": 0, "rest": "none"}}]]},
            "without means",
        ),
        ({"table": [[{"pattern": "random", "density": 0.5, "options": {"seed": 10**30}}]]}, "seed"),
        ({"table": [[{"pattern": "window", "density": 0.5, "options": {"frame_weight": 1e200}}]]}, "frame_weight"),
        ({"reuse_layers": 0}, "reuse_layers"),
        ({"table": [[{"pattern": "pooled", "density": 0.5, "options": {"colour": 1}}]]}, "no option 'colour'"),
        (
            {"table": [[{"pattern": "pooled", "density": 0.5, "options": {"order": 7}}]]},
            "must be a word; the default is 'frames'",
        ),
        ({"table": [[{"pattern": "pooled", "density": 0.5, "options": {"order": "up"}}]]}, "allowed are tiles"),
        ({"table": [[{"pattern": "pooled", "density": 0.5, "options": {"order": ["tiles"]}}]]}, "must be a number"),
        ({"table": [[{"pattern": "pooled", "density": 0.5, "options": [1]}]]}, "must be an object"),
        ({"schema": 99}, "schema 99 is newer than this version of pointillist; upgrade it"),
        ({"schema": "one"}, "schema 'one' is unknown"),
        ({"stages": [{"table": [[{"pattern": "pooled", "density": 2}]]}]}, "density is 2"),
        ({"stages": [{"table": [[{"pattern": "pooled", "density": 1}]], "below": 1.5}]}, "below is 1.5"),
        ({"stages": [{"table": []}]}, "rows"),
        ({"stages": [{"below": 1}]}, "lacks a value"),
        ({"stages": [{"table": [], "until": 1}]}, "no other keys than table, below, transformer"),
        ({"stages": 3}, "wrong kind"),
        ({"block": 0}, "block"),
        ({"dense_first_frame": 1}, "dense_first_frame"),
        ({"grid": [1, 2]}, "grid"),
        ({"schedule": {"dense_steps": -1}}, "dense_steps"),
        ({"schedule": {"dense_every": 1.5}}, "dense_every"),
        ({"measured": {"psnr": "high"}}, "numbers"),
        ({"extra": 1}, "no other keys"),
    ],
)
def test_foreign_values_are_refused(change, message):
    values = json.loads(PLAN.to_json())
    assert Plan.from_json(json.dumps(values)) == PLAN
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps({**values, **change}))


@settings(max_examples=80, deadline=None)
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


def test_the_embedded_models_plan_is_shipped_for_its_architecture():
    from train_embedded.transformer import build_transformer

    mine = [plan for plan in shipped_plans() if plan.model == Wan().fingerprint(build_transformer())]
    assert [plan.name for plan in mine if plan.name.endswith("balanced")]
    for path in Path(plans.__file__).parent.glob("*.safetensors"):
        assert SearchRecord.load(path) is not None


@pytest.mark.parametrize("name", PATTERNS)
def test_a_uniform_plan_of_every_pattern_is_valid(name):
    plan = Plan.uniform(name, 0.3)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.tail in ("none", "pooled")


def test_a_shorter_sequence_keeps_as_many_keys():
    plan = Plan("made", ((Rule("pooled", 0.2), Rule("dense", 1.0), Rule("skip", 1.0)),), grid=(4, 10, 10))
    rules = plan.rules(0)
    assert plan.carried(rules, 400) == plan.carried(rules, 800) == rules
    assert [rule.density for rule in plan.carried(rules, 200)] == [0.4, 1.0, 1.0]
    assert plan.carried(rules, 50)[0].density == 1.0
    assert [rule.pattern for rule in plan.carried(rules, 200)] == ["pooled", "dense", "skip"]


def test_stages_take_over_at_their_sigma_and_transformer():
    tables = [((Rule("pooled", density),),) for density in (0.9, 0.5, 0.4, 0.3)]
    stages = (Stage(tables[2], 0.2), Stage(tables[1], 0.6), Stage(tables[3], 0.5, "transformer_2"))
    plan = Plan("staged", tables[0], stages)

    def density(share, transformer="transformer"):
        return plan.rules(0, share, transformer)[0].density

    assert [density(share) for share in (1.0, 0.61, 0.6, 0.21, 0.2, 0.0)] == [0.9, 0.9, 0.5, 0.5, 0.4, 0.4]
    assert [density(share, "transformer_2") for share in (1.0, 0.6, 0.5, 0.1)] == [0.9, 0.5, 0.3, 0.3]
    assert plan.patterns == {"pooled"}


def test_dense_steps_come_back_every_so_often():
    sigmas = tuple(1 - i / 10 for i in range(10))
    kinds = [Schedule(dense_steps=2, dense_every=3).kind(i, sigmas)[0] for i in range(10)]
    assert "".join(kinds) == "ddssdssdss"


def test_schedule_carries_over_to_any_step_count():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shares = []
    for steps in (10, 20, 50):
        scheduler.set_timesteps(steps)
        sigmas = tuple(float(s) for s in scheduler.sigmas[:steps])
        shares.append(sum(Schedule(dense_above=0.95).kind(i, sigmas) == "dense" for i in range(steps)) / steps)
    assert max(shares) <= 0.2 and min(shares) >= 0.14
    assert Schedule().kind(0, (1.0, 0.5)) == "sparse"
