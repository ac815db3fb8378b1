"""Of image models."""

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLFlux2

from families.parts import NO_TEXT, TEXT, WIDTH, Make, euler, image_vae, picture, qwen_vae, sharpened, sizes


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


IMAGES: dict[str, Make] = {
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
WITHOUT: dict[str, Make] = {"sana": sana, "cogview4": cogview4}
"""With caching alone: linear attention, and a model that no family knows."""
