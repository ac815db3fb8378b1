"""The family that docs/models.md writes works as those that are here; what is no family is refused."""

import re
from pathlib import Path

import pytest

import masked_reference
from families import TEXT, Family
from masked_reference import SPARSE, Facts, check_sparse
from pointillist import AccelerateError, accelerate
from pointillist.accel import models
from pointillist.accel.models import family as base
from pointillist.accel.models import family_of, register

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture
def families(monkeypatch):
    """The list as it was, when the test is over."""
    monkeypatch.setattr(models, "FAMILIES", list(models.FAMILIES))


def test_the_family_of_the_documentation(families, monkeypatch):
    (program,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(program.splitlines()) <= 40
    family = Family("cogview4")
    with pytest.raises(AccelerateError, match=r"docs/models\.md"):
        accelerate(family.pipe, SPARSE)
    exec(compile(program, "docs/models.md", "exec"), {})
    assert family_of(family.pipe.transformer).NAME == "CogView4"
    facts = Facts(r"transformer_blocks\.\d+\.attn1", start=TEXT)
    monkeypatch.setitem(masked_reference.FACTS, "cogview4", facts)
    dense = family.run(steps=2)
    check_sparse(family, 64, batch=2)
    check_sparse(family, (64, 96), guidance=1.0)
    assert (family.run(steps=2) == dense).all()


def test_a_later_family_stands_before_an_earlier_one(families):
    class Mine(type(models.family_of(Family("wan").pipe.transformer))):
        NAME = "mine"

    register(Mine())
    assert family_of(Family("wan").pipe.transformer).NAME == "mine"


def test_what_is_no_family(families):
    with pytest.raises(TypeError, match="is no Family"):
        register(object())

    class Nameless(base.Family):
        pass

    with pytest.raises(TypeError, match="does not say its NAME"):
        register(Nameless())


def test_latents_that_are_no_grid_need_tokens(families):
    flux = Family("flux")  # whose latents are packed

    class Gridless(base.Family):
        NAME, CLASSES, PROCESSORS = "gridless", ("FluxTransformer2DModel",), ("FluxAttnProcessor",)

    register(Gridless())
    with accelerate(flux.pipe, SPARSE), pytest.raises(TypeError, match=r"define tokens\(\)"):
        flux.run(steps=2)
