"""Weights that come and go, in every model family."""

import pytest
import torch

from families import Family
from masked_reference import check_sparse, transformers


def group_offload(family: Family) -> None:
    cpu = torch.device("cpu")
    for each in transformers(family):
        each.enable_group_offload(onload_device=cpu, offload_device=cpu, num_blocks_per_group=1)


def leaf_offload(family: Family) -> None:
    cpu = torch.device("cpu")
    for each in transformers(family):
        each.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def model_offload(family: Family) -> None:
    family.pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("offload", [group_offload, pytest.param(leaf_offload, marks=pytest.mark.slow), model_offload])
def test_offloading(family, offload):
    dense = family.run(steps=2)
    offload(family)
    assert torch.equal(family.run(steps=2), dense)
    check_sparse(family)
    assert torch.equal(family.run(steps=2), dense)
