"""Compiled blocks in every model family."""

from typing import Any

import pytest
import torch
import torch._dynamo

from families import PIPELINES, Family
from masked_reference import SPARSE, transformers
from pointillist import accelerate
from pointillist.accel.models import family_of

EAGER_ONLY = {"hidream": "eager only: its experts are chosen on the host"}


def compile_blocks(transformer: Any) -> None:
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        for block in {block for block, _ in family_of(transformer).sites(transformer)}:
            block.compile(fullgraph=True, backend="eager")


@pytest.mark.parametrize("name", [
    name if name in ("wan", "flux", "sd3", "cosmos") else pytest.param(name, marks=pytest.mark.slow)
    for name in PIPELINES
])  # fmt: skip
def test_compiled(name):
    """One graph for each kind of block, and none more in later steps."""
    family = Family(name)
    with accelerate(family.pipe, SPARSE):
        eager = family.run(steps=2)
    torch._dynamo.reset()
    if family.name in EAGER_ONLY:
        pytest.skip(EAGER_ONLY[family.name])
    with accelerate(family.pipe, SPARSE):
        for each in transformers(family):
            compile_blocks(each)
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(family.run(steps=2), eager, atol=1e-4, rtol=1e-4)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        family.run(steps=4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
        assert not torch._dynamo.utils.counters["graph_break"]
