"""Train the transformer on latents: velocity prediction of a rectified flow. A new run trains the text encoder first.

    PYTHONPATH=.:tools python -m train_embedded.transformer --run runs/dit --latents runs/latents64 --steps 2000

Stages are calls: go on with larger clips by naming another folder of latents and a higher `--steps`.
Resumes from `--run`; a new run may start from the weights of an exported model with `--start`. Matrices inside
the blocks are trained by Muon, everything else by AdamW.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from train_embedded.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from train_embedded.latents import WHOLE, LatentPool
from train_embedded.scene import free_caption
from train_embedded.text import TEXT_WIDTH, build_text_encoder, build_tokenizer, encode_captions, teach_words
from train_embedded.vae import LATENT_CHANNELS

CAPTION_DROPOUT = 0.1
SHIFT = 3.0
"""Of the sampling schedule: more steps where the layout is decided."""


def build_transformer() -> WanTransformer3DModel:
    """An untrained transformer: 6 layers, 4 heads of 64, one token per latent pixel."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=4, attention_head_dim=64, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=TEXT_WIDTH, freq_dim=256, ffn_dim=1024, num_layers=6,
        cross_attn_norm=True, rope_max_seq_len=128,
    )  # fmt: skip


@torch.no_grad()
def silence_padding(transformer: WanTransformer3DModel) -> None:
    """Hold the padding's logits in cross-attention about 16 below the words'. Call it after every step.

    The pipeline pads a caption of ten words with 500 rows of zeros. Left alone, they take nearly all of the
    attention, and training makes a sink of them before it has learned what the words mean. So a zero row's key
    points along the first channel of each head, which is kept out of the words' keys, and all queries lie far
    from it.
    """
    embedder = transformer.condition_embedder.text_embedder
    embedder.linear_1.bias.zero_()
    embedder.linear_2.bias.zero_()
    for attention in (block.attn2 for block in transformer.blocks):
        channels = torch.arange(0, attention.inner_dim, attention.inner_dim // attention.heads)
        for projection, value in ((attention.to_q, -3.0), (attention.to_k, 0.16)):
            projection.bias.zero_()
            projection.weight[channels] = 0
            projection.bias[channels] = value
        attention.norm_q.weight[channels] = 2
        attention.norm_k.weight[channels] = 2


class BiasedTextProcessor:
    """Cross-attention with a logit bias, for the compact text of `encode_captions`."""

    def __init__(self) -> None:
        self.bias: torch.Tensor | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        rotary_emb=None,
    ):
        query = attn.norm_q(attn.to_q(hidden_states))
        key, value = attn.norm_k(attn.to_k(encoder_hidden_states)), attn.to_v(encoder_hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        bias = self.bias if self.bias is None else self.bias.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype), attn_mask=bias)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class Generator(nn.Module):
    """The transformer with its text encoder, which is frozen here."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer)).requires_grad_(False)
        self.transformer = build_transformer()
        self.text_attention = BiasedTextProcessor()
        for block in self.transformer.blocks:
            block.attn2.set_processor(self.text_attention)
            nn.init.zeros_(block.attn2.to_out[0].weight)  # random words are noise that training would shut out
        silence_padding(self.transformer)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Velocity [B, C, T, H, W] of `noisy` at noise level `sigma` [B]."""
        states, self.text_attention.bias = encode_captions(self.tokenizer, self.text_encoder, captions)
        return self.transformer(noisy, sigma * 1000, states, return_dict=False)[0]


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest; learning rates are set at every step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and ".blocks." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained.values() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def sample_noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [count] in (0, 1): half as the sampler will step through them, half logit-normal (0.3, 1).

    Colours and the layout are decided at levels above 0.9, which a logit-normal alone hardly ever draws.
    """
    # stratified over the batch: fewer gradients wasted on accidental bunches of noise levels
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    shifted = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    bell = torch.sigmoid(0.3 + torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
    return torch.where(torch.rand(count, generator=generator) < 0.5, shifted, bell)


def flow_loss(model: Generator, clean: torch.Tensor, captions: list[str], generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity `noise − clean`."""
    sigma = sample_noise_levels(clean.shape[0], generator).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    at = sigma.view(-1, 1, 1, 1, 1)
    velocity = model((1 - at) * clean + at * noise, sigma, captions)
    return F.mse_loss(velocity.float(), noise - clean)


def train(
    run: Path,
    latents: list[Path],
    steps: int,
    batch: list[int],
    rate: float,
    final_rate: float,
    device: str,
    seed: int,
    windows: list[int] | None = None,
    start: Path | None = None,
) -> None:
    """Train to `steps` in all; the rate falls linearly from `rate` where this stage began to `final_rate`.

    Every step draws one of the folders of `latents` and takes `batch` clips from it, one number or one for each.
    `windows` are numbers of latent frames, one of which is drawn for every step; by default whole clips. Short ones
    show more different clips at the same cost, which is how the model learns what the words mean.
    """
    windows = windows or [WHOLE]
    torch.manual_seed(seed)
    model, average = Generator().to(device), Generator().to(device)
    optimizers = build_optimizers(model)
    stage = ",".join(p.name for p in latents) + ("" if windows == [WHOLE] else f" in windows {windows}") + f"→{steps}"
    first, begun = 0, 0
    checkpoint = run / "last.safetensors"
    if checkpoint.exists():
        parts, facts = load_checkpoint(checkpoint)
        model.load_state_dict(parts["weights"])
        average.load_state_dict(parts["average"])
        for i, optimizer in enumerate(optimizers):
            restore_optimizer(optimizer, parts[f"optimizer{i}"])
        first = facts["step"]
        begun = facts["begun"] if facts["stage"] == stage else first
    else:
        if start is not None:
            load_exported(model, start)
        else:
            named = teach_words(model.tokenizer, model.text_encoder, seed=seed)
            print(f"text encoder: {named:.1%} of the attributes named rightly", flush=True)
        average.load_state_dict(model.state_dict())
    sizes = batch if len(batch) == len(latents) else batch * len(latents)
    pools = [(LatentPool(folder), clips) for folder, clips in zip(latents, sizes, strict=True)]
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "log.jsonl", "a") as log:
        started, losses = time.time(), []
        for step in range(first, steps):
            progress = (step - begun) / max(1, steps - begun)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = (rate + (final_rate - rate) * progress) * min(1.0, (step - begun + 1) / 30)
            rng = random.Random(seed * 1_000_003 + step)
            noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
            pool, clips = rng.choice(pools)
            clean, words = pool.batch(clips, rng, rng.choice(windows))
            captions = ["" if rng.random() < CAPTION_DROPOUT else free_caption(w, rng) for w in words]
            with torch.autocast(device, torch.bfloat16):
                loss = flow_loss(model, clean.to(device), captions, noise)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            silence_padding(model.transformer)
            decay = min(0.995, (step - begun + 1) / (step - begun + 10))  # the average starts anew with a stage
            with torch.no_grad():
                for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs, 1 - decay)
            losses.append(loss.item())
            if (step + 1) % 20 == 0:
                line = {
                    "step": step + 1,
                    "stage": stage,
                    "loss": sum(losses) / len(losses),
                    "seconds": time.time() - started,
                }
                print(json.dumps(line), file=log, flush=True)
                losses = []
            if (step + 1) % 100 == 0 or step + 1 == steps:
                for pool, _ in pools:
                    pool.refresh()
                facts = {"step": step + 1, "stage": stage, "begun": begun, "seed": seed}
                states = {"weights": model.state_dict(), "average": average.state_dict()}
                states |= {f"optimizer{i}": optimizer_tensors(o) for i, o in enumerate(optimizers)}
                save_checkpoint(checkpoint, states, facts)


def load_exported(model: Generator, folder: Path) -> None:
    """Take over the weights of an exported model: a Diffusers folder."""
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    model.transformer.load_state_dict(transformer.state_dict())
    model.text_encoder.load_state_dict(text_encoder.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--latents", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="clips per step, one or for each folder")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--final-rate", type=float, default=5e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, nargs="+", help="latent frames per sample, one drawn for every step")
    parser.add_argument("--start", type=Path, help="an exported model to start from, if `--run` is new")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
