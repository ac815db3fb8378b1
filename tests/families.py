"""Tiny random-weight pipelines of every model family, from real Diffusers classes and configurations alone.

No text encoder is loaded: prompts are given as embeddings. `PIPELINES` has one function for each variant; it makes the
pipeline and says how it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from conftest import make_transformer, make_vae
from pointillist import Plan, accelerate
from pointillist.accel.parallel.start import parallelize

TEXT, WIDTH = 12, 32
"""Tokens of a prompt, and channels of an embedding."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch. Masks say what is no padding."""

    embeds: torch.Tensor
    negative: torch.Tensor
    """[B, 12, 32]."""
    mask: torch.Tensor
    negative_mask: torch.Tensor
    """int64 [B, 12]."""

    @property
    def batch(self) -> int:
        return len(self.embeds)

    @property
    def pooled(self) -> torch.Tensor:
        return torch.linspace(-1, 1, WIDTH, dtype=self.embeds.dtype).expand(self.batch, -1)

    def named(self, masks: str = "", negative: bool = True) -> dict[str, torch.Tensor]:
        """As most pipelines take them; `masks` names the argument, after `prompt_`."""
        given = {"prompt_embeds": self.embeds} | ({f"prompt_{masks}": self.mask} if masks else {})
        if negative:
            given["negative_prompt_embeds"] = self.negative
            given |= {f"negative_prompt_{masks}": self.negative_mask} if masks else {}
        return given


Call = Callable[..., torch.Tensor]
"""(prompts, size, guidance, the arguments that all pipelines take) → latents."""


class Family:
    """A pipeline and how to call it: latents out."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        torch.manual_seed(seed)
        self.pipe, self._call = (PIPELINES | WITHOUT)[name]()
        self.pipe.set_progress_bar_config(disable=True)
        self._texts = torch.randn(2, 1, TEXT, WIDTH)

    def run(
        self, size=64, steps=8, guidance=3.0, batch=1, seed=5, lengths=(), negative_lengths=(), padding=None, **extra
    ):
        """Latents of a run.

        Args:
            size: height and width in pixels; or both of them.
            lengths: of the prompts, the tokens that are no padding; all of them where it is not said.
            padding: the value of embeddings of padding.
        """
        texts = [text.expand(batch, -1, -1).clone() for text in self._texts]
        masks = [
            (torch.arange(TEXT) < torch.tensor(each or [TEXT] * batch)[:, None]).long()
            for each in (lengths, negative_lengths)
        ]
        if padding is not None:
            texts = [torch.where(mask[..., None] == 0, padding, text) for text, mask in zip(texts, masks, strict=True)]
        shared = dict(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **extra)
        if self.name != "hunyuan-video-1.5":
            shared["output_type"] = "latent"
        size = (size, size) if isinstance(size, int) else size
        return self._call(self.pipe, Prompts(*texts, *masks), size, guidance, shared)


def sharpened(transformer: Any) -> Any:
    """With attention that is far from uniform, so that what is dropped matters; and with nothing left as it happens to
    lie in memory, or at zero, where it would hide a wrong output behind it."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight")):
                weight.mul_(2)
            elif name.endswith(("to_q.weight", "to_k.weight")):
                weight.mul_(4)
            elif not weight.any() or name.endswith(UNSET):
                weight.normal_(std=0.3)
    return transformer.eval()


UNSET = ("pad_token", "gate_up_proj", "down_proj", "pos_frequencies", "gate.weight")
NO_TEXT = dict(text_encoder=None, tokenizer=None)
euler = FlowMatchEulerDiscreteScheduler


def image_vae(channels: int = 4) -> AutoencoderKL:
    """Compresses by 4."""
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(4, 4, 4), norm_num_groups=1, shift_factor=0.1, **kinds
    ).eval()


def qwen_vae() -> AutoencoderKLQwenImage:
    """Compresses by 4."""
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def picture(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def sizes(size: tuple[int, int]) -> dict[str, int]:
    return dict(height=size[0], width=size[1])


# Video


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


# Images


def flux_transformer(**changes: Any):
    config = dict(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return sharpened(diffusers.FluxTransformer2DModel(**config | changes))


NO_SECOND_TEXT = dict(text_encoder_2=None, tokenizer_2=None, **NO_TEXT)


def flux():
    pipe = diffusers.FluxPipeline(transformer=flux_transformer(), vae=image_vae(), scheduler=euler(), **NO_SECOND_TEXT)
    return pipe, flux_call


def flux_call(pipe, prompts, size, guidance, shared, **extra):
    return pipe(
        **prompts.named(), pooled_prompt_embeds=prompts.pooled, negative_pooled_prompt_embeds=-prompts.pooled,
        true_cfg_scale=guidance, **sizes(size), **shared, **extra,
    ).images  # fmt: skip


def flux_kontext():
    """With as many reference tokens as the image has."""
    pipe = diffusers.FluxKontextPipeline(
        transformer=flux_transformer(), vae=image_vae(), scheduler=euler(), **NO_SECOND_TEXT
    )

    def call(pipe, prompts, size, guidance, shared):
        image = pipe.image_processor.preprocess(picture(size[1], size[0]))
        return flux_call(
            pipe, prompts, size, guidance, shared, image=image, max_area=size[0] * size[1], _auto_resize=False
        )

    return pipe, call


def visualcloze():
    """A row of example pictures and a row with one that is missing: all of it is denoised as one image."""
    transformer = flux_transformer(in_channels=16 + 16 + 64, out_channels=16)
    pipe = diffusers.VisualClozeGenerationPipeline(
        transformer=transformer, vae=image_vae(), scheduler=euler(), resolution=32, **NO_SECOND_TEXT
    )

    def call(pipe, prompts, size, guidance, shared):
        pipe.resolution = pipe.image_processor.resolution = size[0] // 2
        pictures = [[picture(*size), picture(*size)], [picture(*size), None]]
        many = prompts.batch
        given = (["fill"], ["it"]) if many == 1 else (["fill"] * many, ["it"] * many)
        encode = pipe.encode_prompt
        ids = torch.zeros(TEXT, 3)
        pipe.encode_prompt = lambda *args, **kwargs: (prompts.embeds, prompts.pooled, ids)  # asks for both otherwise
        try:
            return pipe(task_prompt=given[0], content_prompt=given[1], image=[pictures] * many, **shared).images
        finally:
            del pipe.encode_prompt
            assert pipe.encode_prompt == encode

    return pipe, call


def flux2():
    """Klein's pipeline, which has true guidance."""
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    vae = AutoencoderKLFlux2(latent_channels=4, block_out_channels=(4, 4, 4), norm_num_groups=1, **kinds)
    pipe = diffusers.Flux2KleinPipeline(
        transformer=sharpened(transformer), vae=vae.eval(), scheduler=euler(), **NO_TEXT
    )

    def call(pipe, prompts, size, guidance, shared):
        return pipe(**prompts.named(), guidance_scale=guidance, **sizes(size), **shared).images

    return pipe, call


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    pipe = diffusers.ChromaPipeline(transformer=sharpened(transformer), vae=image_vae(), scheduler=euler(), **NO_TEXT)

    def call(pipe, prompts, size, guidance, shared):
        masks = {name: mask.bool() for name, mask in prompts.named("attention_mask").items() if "mask" in name}
        return pipe(**prompts.named() | masks, guidance_scale=guidance, **sizes(size), **shared).images

    return pipe, call


def stable_diffusion3(dual: tuple[int, ...] = ()):
    """3.5 has a second self-attention, over the image alone, in its first layers."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=WIDTH, pos_embed_max_size=32,
        dual_attention_layers=dual, qk_norm="rms_norm" if dual else None,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=sharpened(transformer), vae=image_vae(), scheduler=euler(), text_encoder_3=None, tokenizer_3=None,
        **NO_SECOND_TEXT,
    )  # fmt: skip

    def call(pipe, prompts, size, guidance, shared):
        return pipe(
            **prompts.named(), pooled_prompt_embeds=prompts.pooled, negative_pooled_prompt_embeds=-prompts.pooled,
            guidance_scale=guidance, **sizes(size), **shared,
        ).images  # fmt: skip

    return pipe, call


def pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=16, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=sharpened(transformer),
        vae=image_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        **NO_TEXT,
    )

    def call(pipe, prompts, size, guidance, shared):
        return pipe(
            **prompts.named("attention_mask"), negative_prompt=None, guidance_scale=guidance,
            use_resolution_binning=False, **sizes(size), **shared,
        ).images  # fmt: skip

    return pipe, call


def qwen_transformer():
    return sharpened(diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    ))  # fmt: skip


def qwen_call(pipe, prompts, size, guidance, shared, **extra):
    given = prompts.named("embeds_mask", negative=guidance > 1)
    return pipe(**given, true_cfg_scale=guidance, **sizes(size), **shared, **extra).images


def qwen_image():
    pipe = diffusers.QwenImagePipeline(
        transformer=qwen_transformer(), vae=qwen_vae(), scheduler=euler(use_dynamic_shifting=False), **NO_TEXT
    )
    return pipe, qwen_call


def qwen_image_edit():
    """Two pictures to edit, of other sizes than the image."""
    pipe = diffusers.QwenImageEditPlusPipeline(
        transformer=qwen_transformer(), vae=qwen_vae(), scheduler=euler(), processor=None, **NO_TEXT
    )
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    def call(pipe, prompts, size, guidance, shared):
        area, module.VAE_IMAGE_SIZE = module.VAE_IMAGE_SIZE, 32 * 32
        try:
            return qwen_call(pipe, prompts, size, guidance, shared, image=[picture(32, 32), picture(64, 32)])
        finally:
            module.VAE_IMAGE_SIZE = area

    return pipe, call


def nucleus_moe():
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), mlp_ratio=2.0, num_experts=4, moe_intermediate_dim=16,
        capacity_factors=[2.0] * 3, dense_moe_strategy="leave_first_block_dense",
    )  # fmt: skip
    pipe = diffusers.NucleusMoEImagePipeline(
        transformer=sharpened(transformer), vae=qwen_vae(), scheduler=euler(), text_encoder=None, processor=None
    )

    def call(pipe, prompts, size, guidance, shared):
        given = prompts.named("embeds_mask")
        return pipe(**given, guidance_scale=guidance, **sizes(size), **shared).images

    return pipe, call


def lumina_next():
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=16, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=2, num_kv_heads=1,
        multiple_of=16, cross_attention_dim=WIDTH,
    )  # fmt: skip
    pipe = diffusers.LuminaPipeline(transformer=sharpened(transformer), vae=image_vae(), scheduler=euler(), **NO_TEXT)
    pipe.vae_scale_factor = 4  # 8 whatever the autoencoder is

    def call(pipe, prompts, size, guidance, shared):
        return pipe(**prompts.named("attention_mask"), guidance_scale=guidance, **sizes(size), **shared).images

    return pipe, call


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 8), axes_lens=(64, 32, 32), cap_feat_dim=WIDTH,
    )  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(transformer=sharpened(transformer), vae=image_vae(), scheduler=euler(), **NO_TEXT)
    pipe.vae_scale_factor = 4

    def call(pipe, prompts, size, guidance, shared):
        return pipe(**prompts.named("attention_mask"), guidance_scale=guidance, **sizes(size), **shared).images

    return pipe, call


def hidream():
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[WIDTH, WIDTH], text_emb_dim=2 * WIDTH, axes_dims_rope=(8, 4, 4),
        max_resolution=(32, 32), llama_layers=[0, 1, 2, 3],
    )  # fmt: skip
    pipe = diffusers.HiDreamImagePipeline(
        transformer=sharpened(transformer), vae=image_vae(), scheduler=euler(), text_encoder_3=None, tokenizer_3=None,
        text_encoder_4=None, tokenizer_4=None, **NO_SECOND_TEXT,
    )  # fmt: skip

    def call(pipe, prompts, size, guidance, shared):
        pipe.default_sample_size = int((size[0] * size[1]) ** 0.5) // pipe.vae_scale_factor  # the area is made this one
        given = {}
        for sign, text in (("", prompts.embeds), ("negative_", prompts.negative)):
            layers = torch.stack([text.roll(layer, -1) for layer in range(4)])
            pooled = torch.cat([text[:, 0], text[:, 1]], dim=-1)
            given |= {f"{sign}prompt_embeds_t5": text, f"{sign}prompt_embeds_llama3": layers}
            given |= {f"{sign}pooled_prompt_embeds": pooled}
        return pipe(**given, guidance_scale=guidance, **sizes(size), **shared).images

    return pipe, call


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8], axes_lens=[128, 32, 32],
    )  # fmt: skip
    pipe = diffusers.ZImagePipeline(transformer=sharpened(transformer), vae=image_vae(), scheduler=euler(), **NO_TEXT)

    def call(pipe, prompts, size, guidance, shared):
        texts = [
            [text[mask.bool()] for text, mask in zip(*each, strict=True)]
            for each in ((prompts.embeds, prompts.mask), (prompts.negative, prompts.negative_mask))
        ]
        return pipe(
            prompt_embeds=texts[0], negative_prompt_embeds=texts[1], guidance_scale=guidance, **sizes(size), **shared
        ).images

    return pipe, call


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
        sample_size=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3, encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8), encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        scaling_factor=0.4,
    )  # fmt: skip
    pipe = diffusers.SanaPipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=euler(), **NO_TEXT)

    def call(pipe, prompts, size, guidance, shared):
        return pipe(
            **prompts.named("attention_mask"), negative_prompt=None, guidance_scale=guidance,
            use_resolution_binning=False, **sizes(size), **shared,
        ).images  # fmt: skip

    return pipe, call


def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, rope_axes_dim=(32, 32),
    )  # fmt: skip
    pipe = diffusers.CogView4Pipeline(transformer=sharpened(transformer), vae=image_vae(), scheduler=euler(), **NO_TEXT)

    def call(pipe, prompts, size, guidance, shared):
        return pipe(**prompts.named(), guidance_scale=guidance, **sizes(size), **shared).images

    return pipe, call


PIPELINES: dict[str, Callable[[], tuple[Any, Call]]] = {
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
    "flux": flux,
    "flux-kontext": flux_kontext,
    "visualcloze": visualcloze,
    "flux-2": flux2,
    "chroma": chroma,
    "sd3": stable_diffusion3,
    "sd3.5": lambda: stable_diffusion3(dual=(0, 1)),
    "pixart": pixart,
    "qwen-image": qwen_image,
    "qwen-image-edit": qwen_image_edit,
    "nucleus-moe": nucleus_moe,
    "lumina-next": lumina_next,
    "lumina-2": lumina2,
    "hidream": hidream,
    "z-image": z_image,
}
"""With sparse attention, by variant."""
WITHOUT: dict[str, Callable[[], tuple[Any, Call]]] = {"sana": sana, "cogview4": cogview4}
"""With caching alone: linear attention, and a model that no family knows."""


def run_case(name: str) -> torch.Tensor:
    """Latents of a sparse run; shared by all processes of a job."""
    family = Family(name)
    if torch.distributed.is_initialized():
        parallelize(family.pipe, ulysses=torch.distributed.get_world_size())
    with accelerate(family.pipe, Plan.uniform("window", 0.4, tail="none", block=16)):
        return family.run(steps=2)
