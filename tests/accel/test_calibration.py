"""Calibrations of step caches: files, what they hold for, refusals and warnings."""

import contextlib
import json
from dataclasses import asdict, replace

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_pipe
from pointillist import AccelerateError, Plan, accelerate
from pointillist.accel.conflicts import model_of, targets_of
from pointillist.accel.step_cache.calibration import Calibration, CalibrationError, MadeWith
from pointillist.accel.step_cache.magnitude import shipped_curves
from pointillist.accel.step_cache.modulated import shipped_polynomials
from pointillist.accel.step_cache.policy import Caching, CachingError

CURVE = (1.0, 1.1, 0.9, 0.95, 1.0, 0.99, 1.0, 1.0)
OTHER = "wan-made-up"
CALIBRATION = Calibration(
    MadeWith(OTHER, "FlowMatchEulerDiscreteScheduler", 8, 3.0, "none"), CURVE, (2.0, 0.5), ((0.1, 0.2), (0.2, 0.3))
)


def of(pipe, **changes) -> Calibration:
    """Of this pipeline, but for what is changed."""
    return replace(CALIBRATION, made_with=replace(CALIBRATION.made_with, model=model_of(targets_of(pipe)), **changes))


def test_files(tmp_path):
    CALIBRATION.save(tmp_path / "curve.json")
    assert Calibration.load(tmp_path / "curve.json") == CALIBRATION == Calibration.from_json(CALIBRATION.to_json())
    assert [each.name for each in tmp_path.iterdir()] == ["curve.json"]
    for decider, values in (("magnitude", {"curve": CURVE}), ("modulated", {"polynomial": (2.0, 0.5)})):
        caching = Caching.parse(f"{decider}:file={tmp_path / 'curve.json'},threshold=0.3,most=2")
        assert dict(caching.options) == {**values, "threshold": 0.3, "made_with": CALIBRATION.made_with.values}
        assert caching.most == 2 and caching.made.calibrated == CALIBRATION.made_with
    with pytest.raises(CachingError, match="rate needs no calibration"):
        Caching.parse(f"rate:file={tmp_path / 'curve.json'}")
    with pytest.raises(CachingError, match=r"cannot be read as a calibration.*bench cache"):
        Caching.parse("magnitude:file=nowhere.json")
    replace(CALIBRATION, polynomial=None).save(tmp_path / "plain.json")
    with pytest.raises(CachingError, match="has no polynomial"):
        Caching.parse(f"modulated:file={tmp_path / 'plain.json'}")


def test_a_plan_holds_a_calibrated_cache(tmp_path):
    CALIBRATION.save(tmp_path / "curve.json")
    for decider in ("magnitude", "modulated"):
        plan = replace(Plan.uniform("pooled", 0.3), cache=Caching.parse(f"{decider}:file={tmp_path / 'curve.json'}"))
        plan.save(tmp_path / "plan.safetensors")
        again = Plan.load(tmp_path / "plan.safetensors")
        assert again == plan and again.cache.made.calibrated == CALIBRATION.made_with


def test_another_model_is_refused_and_nothing_is_changed(pipe, tmp_path):
    CALIBRATION.save(tmp_path / "curve.json")
    before = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    for cache in (f"magnitude:file={tmp_path / 'curve.json'}", f"modulated:file={tmp_path / 'curve.json'}"):
        with pytest.raises(AccelerateError, match=f"another model: {OTHER}, but here it is wan-2x2x16"):
            accelerate(pipe, "none", cache=cache)
    for cache, known in (
        ("magnitude:curve=flux.1-dev", "a FluxTransformer2DModel of 19 layers"),
        ("magnitude:curve=wan2.1-t2v-14b", "a WanTransformer3DModel of 40 layers"),
        ("modulated:polynomial=wan2.1-t2v-1.3b", "a WanTransformer3DModel of 30 layers"),
    ):
        with pytest.raises(AccelerateError, match=known):
            accelerate(pipe, "none", cache=cache)
    assert {name: set(vars(module)) for name, module in pipe.transformer.named_modules()} == before


def notes(pipe, run, calibration, plan="none", **call) -> str:
    caching = Caching("magnitude", tuple(sorted(calibration.options("magnitude").items())))
    with accelerate(pipe, plan, cache=caching) as handle:
        run(pipe, **{"steps": 8, **call})
        return " ".join(note for note in handle.report().fallbacks if "calibrated" in note)


def test_what_differs_is_told_in_every_report(pipe, run):
    mine = of(pipe)
    assert notes(pipe, run, mine) == ""
    assert "this number of steps: 8; here it is 10" in notes(pipe, run, mine, steps=10)
    assert "the sigma shift 5.0; here it is 3.0" in notes(pipe, run, of(pipe, shift=5.0))
    assert "attention plan 'mine'; here it is 'none'" in notes(pipe, run, of(pipe, plan="mine"))
    sparse = Plan.uniform("pooled", 0.3, block=16)
    assert f"attention plan 'none'; here it is '{sparse.name}'" in notes(pipe, run, mine, sparse)
    assert notes(pipe, run, of(pipe, plan=sparse.name), sparse) == ""
    assert notes(pipe, run, mine, Plan.uniform("dense", 1.0)) == ""  # which is none
    caching = Caching("magnitude", tuple(sorted(mine.options("magnitude").items())))
    with accelerate(pipe, "none", cache=caching) as handle:
        for scheduler, told in (
            (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0), True),
            (FlowMatchEulerDiscreteScheduler(shift=3.0), False),
        ):  # it is given to the pipeline after acceleration
            pipe.scheduler = scheduler
            for _ in range(2):
                run(pipe, steps=8)
                found = " ".join(handle.report().fallbacks)
                sentence = "the scheduler FlowMatchEulerDiscreteScheduler; here it is UniPCMultistepScheduler"
                assert (sentence in found) == told


def test_curves_that_nobody_vouches_for_are_taken(pipe, run):
    with accelerate(pipe, Plan.uniform("pooled", 0.3, block=16), cache=Caching("magnitude", (("curve", CURVE),))) as h:
        run(pipe, steps=12)
        assert not h.report().fallbacks


def test_shipped_curves_say_what_is_known_of_them():
    for curves in (shipped_curves(), shipped_polynomials()):
        for name, (values, made) in curves.items():
            assert made.transformer and made.layers and made.plan == "none" and made.model is None, name
            assert made.steps == (len(values) if curves is shipped_curves() else None)


def test_two_transformers_are_one_model():
    pipe = make_pipe()
    one = model_of(targets_of(pipe))
    assert model_of(targets_of(pipe) * 2) == one and "+" not in one


def read(text: str) -> Calibration | None:
    """None where it is refused."""
    try:
        return Calibration.from_json(text)
    except CalibrationError:
        return None


VALUES = json.loads(CALIBRATION.to_json())
WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.floats(), max_size=3),
    st.lists(st.lists(st.floats(), max_size=3), max_size=2), st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(VALUES)), WRONG)
def test_wrong_values_are_told(name, value):
    """A changed field gives another valid calibration or an error, and never anything else."""
    found = read(json.dumps({**VALUES, name: value}))
    assert found is None or Calibration.from_json(found.to_json()) == found


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(asdict(MadeWith()))), WRONG)
def test_wrong_values_of_what_it_is_made_with_are_told(name, value):
    found = read(json.dumps({**VALUES, "made_with": {**VALUES["made_with"], name: value}}))
    assert found is None or Calibration.from_json(found.to_json()) == found


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_give_a_calibration_or_an_error(tmp_path_factory, noise, cut):
    path = tmp_path_factory.mktemp("fuzz") / "curve.json"
    whole = json.dumps(VALUES).encode()
    for data in (noise, whole[:cut], whole[:cut] + noise, b"[" * 100_000):
        path.write_bytes(data)
        with contextlib.suppress(CalibrationError):
            assert Calibration.load(path) == Calibration.from_json(data.decode())
