"""Train the autoencoder on small crops of rendered clips.

    PYTHONPATH=.:tools python -m train_embedded.vae --run runs/vae --steps 1500

Resumes from `--run` when a checkpoint is there. The last checkpoint holds the weights' moving average,
and the mean and deviation of the latents, which every later stage keeps.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch.nn import functional as F

from train_embedded.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from train_embedded.scene import Words, all_words, render, sample_scene

LATENT_CHANNELS = 16
KL_WEIGHT = 1e-5
EXTENTS = ((9, 48), (17, 40), (33, 32))
"""Frames and side of the crops, about equally costly; one pair per step."""


def build_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """An untrained autoencoder: 8× smaller in space, 4× in time, 16 latent channels."""
    vae = AutoencoderKLWan(
        base_dim=32,
        dim_mult=[1, 2, 2],
        z_dim=LATENT_CHANNELS,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        latents_mean=mean or [0.0] * LATENT_CHANNELS,
        latents_std=std or [1.0] * LATENT_CHANNELS,
    )
    # The default initialisation shrinks the signal in every convolution until only biases are left, and
    # hundreds of steps go by before colours come through. Biases are not zero: an all-zero position has no norm.
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.normal_(module.bias, std=0.02)
    with torch.no_grad():  # begin almost without sampling noise
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
    return vae


def sample_crop(words: list[Words], rng: random.Random, frames: int, crop: int) -> torch.Tensor:
    """A crop of a clip, `[3, frames, crop, crop]` in [-1, 1], from the pace of a 33-frame clip, mostly on an edge."""
    scene = sample_scene(rng.choice(words), rng)
    side = rng.choice([64, 64, 96, 128, 176])
    start = rng.randrange(0, 33 - frames + 1)
    clip = render(scene, 33, side, side)[:, start : start + frames]
    background = clip[:, :1, :1, :1]
    for _ in range(4):
        top, left = rng.randrange(side - crop + 1), rng.randrange(side - crop + 1)
        window = clip[:, :, top : top + crop, left : left + crop]
        if (window != background).any():
            break
    return window * 2 - 1


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its final clamp, whose gradient is zero just where our saturated colours lie."""
    vae.clear_cache()
    states = vae.post_quant_conv(latents)
    frames = []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(states[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, clips: int, seed: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over whole small clips."""
    rng, words = random.Random(seed), all_words()
    latents = torch.cat(
        [
            vae.encode(
                render(sample_scene(rng.choice(words), rng), 33, 64, 64)[None].to(vae.device) * 2 - 1
            ).latent_dist.mean
            for _ in range(clips)
        ]
    )
    return latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()


class ConvolutionMuon(torch.optim.Muon):
    """Muon (Jordan 2024) on convolutions: each weight is orthogonalised as a matrix [out, in · kernel]."""

    def __init__(self, weights: list[torch.nn.Parameter], lr: float) -> None:
        self.weights = weights
        self.matrices = [torch.nn.Parameter(w.data.flatten(1)) for w in weights]  # views of the same storage
        super().__init__(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure=None):
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)


def build_optimizers(vae: AutoencoderKLWan) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions, AdamW for gains and biases."""
    weights = [p for p in vae.parameters() if p.ndim >= 4 and p.shape[0] > 1 and p.flatten(1).shape[1] > 16]
    chosen = {id(p) for p in weights}
    rest = [p for p in vae.parameters() if id(p) not in chosen]
    return [
        ConvolutionMuon(weights, lr=1e-3),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def train(run: Path, steps: int, batch: int, rate: float, device: str, seed: int) -> None:
    """Train to `steps` in all, from wherever `run` stands."""
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    average = build_vae().to(device)
    average.load_state_dict(vae.state_dict())
    optimizers = build_optimizers(vae)
    first, checkpoint = 0, run / "last.safetensors"
    if checkpoint.exists():
        parts, facts = load_checkpoint(checkpoint)
        vae.load_state_dict(parts["weights"])
        average.load_state_dict(parts["average"])
        for i, optimizer in enumerate(optimizers):
            restore_optimizer(optimizer, parts[f"optimizer{i}"])
        first = facts["step"]
    words = all_words()
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "log.jsonl", "a") as log:
        started = time.time()
        for step in range(first, steps):
            rng = random.Random(seed * 1_000_003 + step)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate * min(1.0, (step + 1) / 50) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            frames, crop = rng.choice(EXTENTS)
            clips = torch.stack([sample_crop(words, rng, frames, crop) for _ in range(batch)]).to(device)
            with torch.autocast(clips.device.type, torch.bfloat16):
                posterior = vae.encode(clips).latent_dist
                restored = decode_unclamped(vae, posterior.sample()).float()
            error = F.l1_loss(restored, clips) + F.mse_loss(restored, clips)
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
            vae.zero_grad()
            (error + KL_WEIGHT * kl).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            decay = min(0.99, (step + 1) / (step + 10))
            with torch.no_grad():
                for mine, theirs in zip(average.parameters(), vae.parameters(), strict=True):
                    mine.lerp_(theirs, 1 - decay)
            if (step + 1) % 20 == 0:
                psnr = -10 * torch.log10(F.mse_loss(restored.clamp(-1, 1), clips) / 4).item()
                line = {
                    "step": step + 1,
                    "loss": error.item(),
                    "kl": kl.item(),
                    "psnr": psnr,
                    "seconds": time.time() - started,
                }
                print(json.dumps(line), file=log, flush=True)
            if (step + 1) % 200 == 0 or step + 1 == steps:
                mean, std = latent_statistics(average, 24, seed)
                facts = {"step": step + 1, "latents_mean": mean, "latents_std": std, "seed": seed}
                states = {"weights": vae.state_dict(), "average": average.state_dict()}
                states |= {f"optimizer{i}": optimizer_tensors(o) for i, o in enumerate(optimizers)}
                save_checkpoint(checkpoint, states, facts)


def load_vae(run: Path) -> AutoencoderKLWan:
    """The trained autoencoder: of a run (averaged weights and latent statistics), or of an exported folder."""
    if (run / "config.json").exists():
        return AutoencoderKLWan.from_pretrained(run, torch_dtype=torch.float32).eval().requires_grad_(False)
    parts, facts = load_checkpoint(run / "last.safetensors")
    vae = build_vae(facts["latents_mean"], facts["latents_std"])
    vae.load_state_dict(parts["average"])
    return vae.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
