"""Weights that are not as they were made, in every model family: LoRA, eight bits, saved and loaded."""

import pytest
import torch
from peft import LoraConfig

from masked_reference import SPARSE, check_sparse, transformers
from pointillist import accelerate


@pytest.mark.parametrize("fused", [False, True])
def test_lora(family, fused):
    if not hasattr(family.pipe.transformer, "add_adapter"):
        pytest.skip("Diffusers loads no LoRA into it")
    dense = family.run(steps=2)
    for each in transformers(family):
        each.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
        with torch.no_grad():
            for name, weight in each.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.2)
        if fused:
            each.fuse_lora()
    adapted = family.run(steps=2)
    assert not torch.allclose(adapted, dense)
    check_sparse(family)
    assert torch.equal(family.run(steps=2), adapted)


def test_layerwise_casting(family):
    for each in transformers(family):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense = family.run(steps=2)
    check_sparse(family)
    assert torch.equal(family.run(steps=2), dense)


def test_save_and_load_after_restoring(family, tmp_path):
    with accelerate(family.pipe, SPARSE):
        family.run(steps=2)
    expected = family.run(steps=2)
    for name in ("transformer", "transformer_2"):
        if getattr(family.pipe, name, None) is not None:
            getattr(family.pipe, name).save_pretrained(tmp_path / name)
            kind = type(getattr(family.pipe, name))
            family.pipe.register_modules(**{name: kind.from_pretrained(tmp_path / name)})
    torch.testing.assert_close(family.run(steps=2), expected, atol=1e-5, rtol=1e-5)
