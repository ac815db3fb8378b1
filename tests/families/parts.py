"""What the tiny pipelines share: prompts, weights and autoencoders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from PIL import Image

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

Make = Callable[[], tuple[Any, Call]]
"""() → a pipeline, and how it is called."""


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
