"""What is predicted is what runs; and seconds are those of the last run."""

import pytest

from pointillist.pipelines.generate import GenerateRequest, generate
from pointillist.pipelines.known_plans import known_plans
from pointillist.pipelines.load import ModelError
from pointillist.pipelines.outline import outline_of
from pointillist.pipelines.predict import Predictor

SMALL = {"width": 64, "height": 64, "frames": 9, "seed": 3, "warm_up": False}


@pytest.mark.parametrize(
    "how",
    [
        {"speed": "exact"},
        {"pattern": "pooled", "density": 0.3},
        {"pattern": "window", "density": 0.5, "regions": "easy"},
    ],
)
def test_kinds_density_tokens_and_plan_are_those_that_run(tiny_folder, tmp_path, how):
    request = GenerateRequest(
        "a red circle", output=tmp_path / "a.gif", model=str(tiny_folder), steps=8, **SMALL, **how
    )
    predictor = Predictor()
    before = predictor.predict(request)
    facts = generate(request).facts
    if "regions" not in how:  # regions compute everything once more where caches of the scheduler begin
        assert list(before.kinds) == facts["kinds"]
    assert before.kinds.count("region") >= facts["steps_run"]["region"] and len(before.kinds) == 8
    assert before.tokens == facts["tokens"] and before.plan == facts["plan"]
    assert before.density == pytest.approx(1.0 if facts["density"] is None else facts["density"], abs=0.06)
    assert before.seconds > 0 and not before.measured
    predictor.learn(facts)
    after = predictor.predict(request)
    assert after.measured
    if "regions" not in how:
        assert after.seconds == pytest.approx(facts["seconds"]["total"], rel=0.02)
    predictor.learn({"model": "no such"})
    predictor.learn({})
    assert predictor.predict(request) == after


def test_what_does_not_fit_is_refused_as_the_generation_would(tiny_folder, tmp_path):
    for changes, said in (({"width": 70}, "multiples of 16"), ({"frames": 8}, "multiples of 4 plus 1")):
        with pytest.raises(ValueError, match=said):
            Predictor().predict(GenerateRequest("a", model=str(tiny_folder), **{**SMALL, **changes}))
    with pytest.raises(ModelError, match="there is no model"):
        Predictor().predict(GenerateRequest("a", model="/nowhere/at/all"))


def test_an_outline_knows_sizes_and_plans_without_weights(tiny_folder, tmp_path):
    embedded, tiny = outline_of("embedded"), outline_of(str(tiny_folder))
    assert next(embedded.transformer.parameters()).is_meta
    assert embedded.sides == tuple(range(64, 193, 16)) and embedded.lengths[0] == 17 and embedded.shift == 3.0
    assert all(side % 16 == 0 for side in tiny.sides) and all(count % 4 == 1 for count in tiny.lengths)
    (tmp_path / "broken.safetensors").write_bytes(b"no plan")
    plans = known_plans(embedded, [tmp_path / "broken.safetensors"])
    assert [(plan.name, plan.fits) for plan in plans] == [
        ("embedded-balanced", True), ("embedded-fast", True), ("embedded-quality", True), ("broken", False),
    ]  # fmt: skip
    others = known_plans(tiny, [])
    assert not any(plan.fits for plan in others) and all("was made for the model" in plan.words for plan in others)
