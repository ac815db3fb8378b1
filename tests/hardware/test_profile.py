"""Hardware profiles: those that ship are complete, and any other bytes give a profile or a sentence."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointillist.hardware.profile import LOSSES, NUMBERS, POSITIVE, HardwareProfile, load_profile, profile_names

GPUS = {"a100", "h100", "h200", "b200", "rtx4090", "rtx5090", "mi300x"}


def test_the_shipped_profiles_load_and_say_where_each_number_is_from():
    assert set(profile_names()) > GPUS and len(profile_names()) >= len(GPUS) + 2
    for name in profile_names():
        profile = load_profile(name)
        assert all(len(profile.sources[field]) > 10 for field in NUMBERS)
        assert (profile.kind == "cpu") == (name not in GPUS)
        assert profile.error is None, "an error is measured on a machine, not shipped"


def test_data_sheets_agree_with_units_and_clocks():
    """Tensor cores of Ampere, Hopper and Blackwell do 2048, 4096 and 8192 operations per clock, CDNA 3 2048."""
    for name, per_clock in {"a100": 2048, "h100": 4096, "h200": 4096, "b200": 8192, "mi300x": 2048}.items():
        profile = load_profile(name)
        clock = profile.exp_gps / 16 / profile.units
        assert profile.matmul_tflops["bfloat16"] == pytest.approx(per_clock * clock * profile.units / 1e3, rel=0.02)


def test_a_profile_survives_its_file(tmp_path):
    profile = replace(load_profile("h100"), error=0.07)
    path = tmp_path / "mine.json"
    profile.save(path)
    assert load_profile(path) == profile
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_name_says_which_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"a100.*h100.*FILE\.json"):
        load_profile("h1000")
    with pytest.raises(ValueError, match="no hardware profile"):
        load_profile(tmp_path / "none.json")


@pytest.mark.parametrize("field", [*POSITIVE, *LOSSES, "units"])
@pytest.mark.parametrize("value", [None, "1", True, -1, float("nan"), float("inf"), 10**400, [1]])
def test_every_number_is_checked(field, value):
    with pytest.raises(ValueError, match=field):
        replace(load_profile("h100"), **{field: value})


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "tpu"}, {"name": ""}, {"matmul_tflops": {}}, {"matmul_tflops": {"int8": 1.0}}, {"extra": 1},
        {"matmul_tflops": {"bfloat16": 0}}, {"sources": {}}, {"sources": {"units": " "}}, {"error": -1}, {"kind": []},
    ],
)  # fmt: skip
def test_wrong_values_are_named(change, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**json.loads(load_profile("h100").to_json()), **change}))
    with pytest.raises(ValueError, match=next(iter(change))):
        load_profile(path)


def test_a_lacking_field_is_named():
    values = json.loads(load_profile("h100").to_json())
    del values["memory_gbs"]
    with pytest.raises(ValueError, match="lacks memory_gbs"):
        HardwareProfile.from_json(json.dumps(values))


@given(st.binary(max_size=200))
def test_any_bytes_give_a_profile_or_a_value_error(data):
    with pytest.raises(ValueError):
        HardwareProfile.from_json(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*NUMBERS, "name", "kind", "sources", "error"]), JSON)
def test_any_value_gives_a_profile_or_a_value_error(field, value):
    text = json.dumps({**json.loads(load_profile("a100").to_json()), field: value})
    try:
        profile = HardwareProfile.from_json(text)
    except ValueError:
        return
    assert HardwareProfile.from_json(profile.to_json()) == profile
