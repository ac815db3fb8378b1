"""Of video models."""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
)

from conftest import make_transformer, make_vae
from families.parts import NO_TEXT, TEXT, WIDTH, Make, euler, picture, sharpened, sizes


def wan(**components: Any):
    parts = dict(transformer=sharpened(make_transformer()), vae=make_vae(), scheduler=euler(shift=3.0), **NO_TEXT)
    return diffusers.WanPipeline(**parts | components), wan_call


def wan_call(pipe, prompts, size, guidance, shared, frames=9, **extra):
    return pipe(**prompts.named(), guidance_scale=guidance, num_frames=frames, **sizes(size), **shared, **extra).frames


def wan_i2v():
    """2.1: the image is in the latents, and its embeddings in cross-attention."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    transformer = make_transformer(in_channels=36, image_dim=16, added_kv_proj_dim=32)
    encoder = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    pipe = diffusers.WanImageToVideoPipeline(
        transformer=sharpened(transformer), vae=make_vae(), scheduler=euler(shift=3.0),
        image_encoder=CLIPVisionModel(encoder).eval(), image_processor=CLIPImageProcessor(), **NO_TEXT,
    )  # fmt: skip

    def call(pipe, prompts, size, guidance, shared):
        long = [torch.nn.functional.pad(text, (0, 0, 0, 500)) for text in (prompts.embeds, prompts.negative)]
        return pipe(
            image=picture(size[1], size[0]), prompt_embeds=long[0], negative_prompt_embeds=long[1],
            guidance_scale=guidance, num_frames=9, **sizes(size), **shared,
        ).frames  # fmt: skip

    return pipe, call


def wan_vace():
    from diffusers import WanVACETransformer3DModel

    config = {key: value for key, value in make_transformer().config.items() if not key.startswith("_")}
    transformer = WanVACETransformer3DModel(**config | dict(num_layers=3, vace_layers=[0, 2], vace_in_channels=96))
    pipe = diffusers.WanVACEPipeline(
        transformer=sharpened(transformer), vae=make_vae(), scheduler=euler(shift=3.0), **NO_TEXT
    )
    return pipe, wan_call


def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=1
    )
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=sharpened(transformer), vae=vae.eval(), scheduler=euler(shift=7.0), text_encoder_2=None,
        tokenizer_2=None, **NO_TEXT,
    )  # fmt: skip

    def call(pipe, prompts, size, guidance, shared):
        return pipe(
            **prompts.named("attention_mask"), pooled_prompt_embeds=prompts.pooled,
            negative_pooled_prompt_embeds=-prompts.pooled, true_cfg_scale=guidance, num_frames=9, **sizes(size),
            **shared,
        ).frames  # fmt: skip

    return pipe, call


def hunyuan_video_15():
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=16, rope_axes_dim=(4, 4, 8),
        target_size=64, task_type="t2v",
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1, spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=sharpened(transformer), vae=vae.eval(), scheduler=euler(shift=7.0), text_encoder_2=None,
        tokenizer_2=None, guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0), **NO_TEXT,
    )  # fmt: skip
    pipe.vision_num_semantic_tokens = 7

    def call(pipe, prompts, size, guidance, shared):
        pipe.guider = pipe.guider.new(guidance_scale=guidance)
        return pipe(
            **prompts.named("embeds_mask"), prompt_embeds_2=prompts.embeds[:, :6],
            prompt_embeds_mask_2=prompts.mask[:, -6:].flip(1), negative_prompt_embeds_2=prompts.negative[:, :6],
            negative_prompt_embeds_mask_2=prompts.negative_mask[:, -6:].flip(1), num_frames=9, output_type="latent",
            height=size[0], width=size[1], **shared,
        ).frames  # fmt: skip

    return pipe, call


def cogvideox(patch_size_t: int | None = None):
    """1.5 has patches of two frames, and rotary embeddings in place of sine waves."""
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=WIDTH, num_layers=2, sample_width=32, sample_height=32, sample_frames=9,
        max_text_seq_length=TEXT,
        patch_size_t=patch_size_t, use_rotary_positional_embeddings=patch_size_t is not None,
        patch_bias=patch_size_t is None,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=1
    )
    kind = diffusers.CogVideoXDDIMScheduler if patch_size_t is None else diffusers.CogVideoXDPMScheduler
    pipe = diffusers.CogVideoXPipeline(transformer=sharpened(transformer), vae=vae.eval(), scheduler=kind(), **NO_TEXT)
    return pipe, partial(wan_call, max_sequence_length=TEXT)


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=4, caption_channels=WIDTH,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False), decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(transformer=sharpened(transformer), vae=vae.eval(), scheduler=euler(), **NO_TEXT)

    def call(pipe, prompts, size, guidance, shared):
        return pipe(
            **prompts.named("attention_mask"), guidance_scale=guidance, num_frames=17, **sizes(size), **shared
        ).frames

    return pipe, call


def ltx2():
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=WIDTH, rope_double_precision=False,
        rope_type="split",
    )  # fmt: skip
    heads = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in dict(
            num_attention_heads=4, attention_head_dim=8, num_layers=1, num_learnable_registers=None
        ).items()
    }
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=1, connector_rope_base_seq_len=32, rope_double_precision=False,
        causal_temporal_positioning=False, rope_type="split", **heads,
    )  # fmt: skip
    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_type=("spatial",),
        upsample_residual=(False,), upsample_factor=(1,), patch_size=8, patch_size_t=1, decoder_causal=False,
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    pipe = diffusers.LTX2Pipeline(
        transformer=sharpened(transformer), vae=vae.eval(), audio_vae=audio_vae.eval(), vocoder=vocoder.eval(),
        connectors=connectors.eval(), scheduler=euler(), **NO_TEXT,
    )  # fmt: skip
    plain = dict(stg_scale=0.0, audio_stg_scale=0.0, modality_scale=1.0, audio_modality_scale=1.0)

    def call(pipe, prompts, size, guidance, shared):
        return pipe(
            **prompts.named("attention_mask"), guidance_scale=guidance, audio_guidance_scale=guidance, num_frames=3,
            spatio_temporal_guidance_blocks=None, **plain, **sizes(size), **shared,
        ).frames  # fmt: skip

    return pipe, call


def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=3, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=WIDTH, time_embed_dim=8, max_sequence_length=16,
    )  # fmt: skip
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    scheduler = euler(invert_sigmas=True)
    pipe = diffusers.MochiPipeline(transformer=sharpened(transformer), vae=vae.eval(), scheduler=scheduler, **NO_TEXT)

    def call(pipe, prompts, size, guidance, shared):
        return pipe(
            **prompts.named("attention_mask"), guidance_scale=guidance, num_frames=13, **sizes(size), **shared
        ).frames

    return pipe, call


def skyreels_v2():
    config = {key: value for key, value in make_transformer().config.items() if not key.startswith("_")}
    transformer = diffusers.SkyReelsV2Transformer3DModel(**config)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = diffusers.SkyReelsV2Pipeline(
        transformer=sharpened(transformer), vae=make_vae(), scheduler=scheduler, **NO_TEXT
    )
    return pipe, wan_call


class Unguarded(diffusers.ModelMixin, diffusers.ConfigMixin):
    """In place of Cosmos' guardrail, which is large and is fetched."""

    config_name = "config.json"

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def cosmos():
    """Without the mask of what was cropped, which takes torchvision."""
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=False,
    )  # fmt: skip
    vae = AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )

    pipe = diffusers.CosmosTextToWorldPipeline(
        transformer=sharpened(transformer), vae=vae.eval(), scheduler=scheduler, safety_checker=Unguarded(), **NO_TEXT
    )
    return pipe, wan_call


VIDEOS: dict[str, Make] = {
    "wan": wan,
    "wan2.2-a14b": lambda: wan(transformer_2=sharpened(make_transformer()), boundary_ratio=0.8),
    "wan2.2-ti2v-5b": lambda: wan(expand_timesteps=True),
    "wan-i2v": wan_i2v,
    "wan-vace": wan_vace,
    "hunyuan-video": hunyuan_video,
    "hunyuan-video-1.5": hunyuan_video_15,
    "cogvideox": cogvideox,
    "cogvideox-1.5": lambda: cogvideox(patch_size_t=2),
    "ltx": ltx,
    "ltx-2": ltx2,
    "mochi": mochi,
    "skyreels-v2": skyreels_v2,
    "cosmos": cosmos,
}
