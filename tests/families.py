"""Tiny random-weight pipelines of several families, from real Diffusers classes."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from conftest import make_pipe


def flux_pipe() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=1, use_quant_conv=False).eval()
    return _quiet(FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    ))  # fmt: skip


def ltx_pipe() -> LTXPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=4, caption_channels=32,
    ).eval()  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip
    return _quiet(LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
        transformer=transformer,
    ))  # fmt: skip


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Family:
    """A pipeline and how to call it: latents out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe = {"wan": make_pipe, "flux": flux_pipe, "ltx": ltx_pipe}[name]()
        self._texts = torch.randn(2, 1, 12, 32)

    def run(self, size=64, steps=8, guidance=3.0, batch=1, seed=5, **extra):
        texts = [text.expand(batch, -1, -1) for text in self._texts]
        shared = dict(
            height=size, width=size, num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(seed), **extra,
        )  # fmt: skip
        if self.name == "wan":
            return self.pipe(
                prompt_embeds=texts[0], negative_prompt_embeds=texts[1], guidance_scale=guidance, num_frames=9, **shared
            ).frames
        if self.name == "flux":
            pooled = torch.ones(batch, 32)
            return self.pipe(
                prompt_embeds=texts[0], pooled_prompt_embeds=pooled, negative_prompt_embeds=texts[1],
                negative_pooled_prompt_embeds=pooled, true_cfg_scale=guidance, **shared,
            ).images  # fmt: skip
        mask = torch.ones(batch, 12)
        return self.pipe(
            prompt_embeds=texts[0], prompt_attention_mask=mask, negative_prompt_embeds=texts[1],
            negative_prompt_attention_mask=mask, guidance_scale=guidance, num_frames=9, **shared,
        ).frames  # fmt: skip
