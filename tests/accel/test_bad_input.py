"""What cannot be accelerated is told before anything is changed; what changes later is noticed."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, SkyReelsV2DiffusionForcingPipeline
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from families import Family
from pointillist import AccelerateError, Plan, accelerate
from pointillist.accel.models import family_of
from pointillist.accel.models.family import Tokens
from pointillist.accel.sequence import NotTheGridError, sequence_of

SPARSE = Plan.uniform("window", 0.4, tail="none", block=16)


def state_of(pipe) -> list:
    """Everything that accelerating changes: attributes of all parts, processors, hooks."""
    parts = [each for each in pipe.components.values() if isinstance(each, torch.nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    return [
        [set(vars(each)) for each in (*modules, pipe.scheduler)],
        [getattr(module, "processor", None) for module in modules],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
    ]


def refused(family: Family, match: str, **wish) -> None:
    before, latents = state_of(family.pipe), family.run(steps=2)
    before = state_of(family.pipe)
    with pytest.raises(AccelerateError, match=match):
        accelerate(family.pipe, **{"plan": SPARSE} | wish)
    assert state_of(family.pipe) == before
    assert torch.equal(family.run(steps=2), latents)


@pytest.mark.parametrize("name", ["flux", "sd3", "mochi", "z-image"])
def test_an_accelerated_pipeline(name):
    """Known by its backend, or by the class of its processors."""
    family = Family(name)
    with accelerate(family.pipe, SPARSE) as handle:
        expected, before = family.run(steps=2), state_of(family.pipe)
        for wish in (SPARSE, "none", "auto"):
            with pytest.raises(AccelerateError, match=r"already accelerated; call restore\(\)"):
                accelerate(family.pipe, wish)
        assert state_of(family.pipe) == before
        assert torch.equal(family.run(steps=2), expected) and handle.report().steps["sparse"] == 2


def test_ip_adapters():
    """Their processors attend to the picture in a second call."""
    family = Family("flux")
    attention = family.pipe.transformer.transformer_blocks[1].attn
    attention.set_processor(FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32))
    with pytest.raises(
        AccelerateError, match=r"FluxIPAdapterAttnProcessor at transformer_blocks\.1\.attn.*IP-Adapters"
    ):
        accelerate(family.pipe, SPARSE)
    assert type(attention.processor) is FluxIPAdapterAttnProcessor
    assert not hasattr(family.pipe.transformer.transformer_blocks[0], "_pointillist_site")
    family = Family("sd3.5")
    processor = SD3IPAdapterJointAttnProcessor2_0(hidden_size=32, ip_hidden_states_dim=32, head_dim=16)
    family.pipe.transformer.transformer_blocks[2].attn.set_processor(processor)
    with pytest.raises(AccelerateError, match="SD3IPAdapterJointAttnProcessor2_0 at transformer_blocks"):
        accelerate(family.pipe, SPARSE)


def test_a_processor_of_the_user():
    family = Family("wan")

    class Mine(WanAttnProcessor):
        pass

    family.pipe.transformer.blocks[1].attn1.set_processor(Mine())
    refused(family, r"a Mine at blocks\.1\.attn1")


@pytest.mark.parametrize("name", ["flux", "hunyuan-video", "cogvideox", "qwen-image", "mochi"])
def test_another_cache(name):
    family = Family(name)
    family.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    refused(family, r"disable_cache\(\)")
    refused(family, r"disable_cache\(\)", plan="none", cache="easy")


@pytest.mark.parametrize("mark", ["_is_cached", "enable_teacache"])
def test_a_cache_of_another_package(mark):
    family = Family("flux")
    setattr(family.pipe.transformer, mark, True)
    refused(family, "cached by")


@pytest.mark.parametrize("missing", ["transformer", "transformer_2"])
def test_a_half_loaded_pair_of_experts(missing):
    family = Family("wan2.2-a14b")
    family.pipe.register_modules(**{missing: None})
    before = state_of(family.pipe)
    other = {"transformer", "transformer_2"} - {missing}
    with pytest.raises(AccelerateError, match=rf"only pipe\.{other.pop()} is there; load both"):
        accelerate(family.pipe, SPARSE)
    assert state_of(family.pipe) == before


@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "mochi", "hunyuan-video", "lumina-2"])
def test_a_pipeline_that_moves_to_another_dtype(name):
    """Layouts and memories are made anew, and what ran before is forgotten."""
    family = Family(name)
    family.pipe.vae.to(torch.float64)
    with accelerate(family.pipe, SPARSE) as handle:
        family.run(steps=2)
        family.pipe.transformer.to(torch.float64)
        family._texts = family._texts.double()
        double = family.run(steps=2)
        assert not handle.report().fallbacks and handle.report().steps["sparse"] == 2
    with accelerate(family.pipe, SPARSE):
        assert torch.equal(family.run(steps=2), double)
    assert double.dtype == torch.float64 and not torch.equal(family.run(steps=2), double)


def test_masks_that_are_no_padding_run_densely():
    """SkyReels-V2 with diffusion forcing hides later frames from earlier ones."""
    family = Family("skyreels-v2")
    pipe = SkyReelsV2DiffusionForcingPipeline(**family.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    texts = dict(prompt=None, prompt_embeds=family._texts[0], negative_prompt_embeds=family._texts[1])

    def run(causal_block_size):
        return pipe(
            **texts, height=64, width=64, num_frames=13, base_num_frames=13, num_inference_steps=3,
            output_type="latent", generator=torch.Generator().manual_seed(1), causal_block_size=causal_block_size,
        ).frames  # fmt: skip

    with accelerate(pipe, SPARSE) as handle:
        run(1)
        report = handle.report()
        assert report.steps["sparse"] == 3 and not report.fallbacks
    dense = run(2)
    with accelerate(pipe, SPARSE) as handle:
        assert torch.equal(run(2), dense)
        report = handle.report()
    assert report.steps["sparse"] == 0 and report.steps["dense"] == 3
    assert any("which is not padding" in note for note in report.fallbacks)


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.zeros(2, 1, 1, 60), "float32"),
        (torch.ones(60, 60, dtype=torch.bool), "not padding"),
        (torch.ones(2, 60, 60, dtype=torch.bool), "not padding"),
        (torch.ones(2, 1, 1, 48, dtype=torch.bool), "not padding"),
        (torch.ones(2, 1, 7, 60, dtype=torch.bool), "not padding"),
        (torch.ones(3, 1, 1, 60, dtype=torch.bool), "not padding"),
    ],
    ids=lambda each: str(list(each.shape)) if isinstance(each, torch.Tensor) else "",
)
def test_masks_of_unexpected_shape(mask, why):
    tokens, x = Tokens((3, 4, 4)), torch.zeros(2, 60, 1, 8)
    with pytest.raises(NotTheGridError, match=why):
        sequence_of(family_of(Family("hunyuan-video").pipe.transformer), tokens, x, x, mask)


def test_calls_that_are_not_the_grid():
    family, x = family_of(Family("wan").pipe.transformer), torch.zeros(1, 47, 1, 8)
    with pytest.raises(NotTheGridError, match="47 tokens are not the grid 3×4×4"):
        sequence_of(family, Tokens((3, 4, 4)), x, x, None)
