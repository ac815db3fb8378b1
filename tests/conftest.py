"""Tiny random-weight pipelines from real Diffusers classes."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is first imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel


def make_transformer(layers: int = 2, **changes) -> WanTransformer3DModel:
    config = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    transformer = WanTransformer3DModel(**{**config, **changes}).eval()
    with torch.no_grad():
        for block in transformer.blocks:  # attention that is far from uniform, so that what is dropped matters
            block.attn1.norm_q.weight.mul_(2)
            block.attn1.norm_k.weight.mul_(2)
    return transformer


def make_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def make_pipe(**components) -> WanPipeline:
    torch.manual_seed(torch.seed() % 2**31)
    parts = dict(
        transformer=make_transformer(), vae=make_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip
    pipe = WanPipeline(**{**parts, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> WanPipeline:
    return make_pipe()


@pytest.fixture
def run():
    """Run a tiny pipeline with the same prompts and noise each time; latents [B, 16, F, H, W]."""
    texts = torch.randn(2, 1, 12, 32)

    def call(pipe, *, size=64, frames=9, steps=4, guidance=3.0, batch=1, seed=5, **extra):
        return pipe(
            prompt_embeds=texts[0].expand(batch, -1, -1), negative_prompt_embeds=texts[1].expand(batch, -1, -1),
            height=size, width=size, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed), output_type="latent", **extra,
        ).frames  # fmt: skip

    return call


def make_text_parts(width: int = 32) -> dict:
    """A tokenizer and a text encoder, tiny and random."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "on", "black"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = UMT5Config(vocab_size=len(words), d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return dict(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"),
        text_encoder=UMT5EncoderModel(config).eval(),
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A complete Diffusers folder with a tokenizer and a text encoder, all of it tiny and random."""
    folder = tmp_path_factory.mktemp("tiny")
    make_pipe(**make_text_parts()).save_pretrained(folder)
    return folder
