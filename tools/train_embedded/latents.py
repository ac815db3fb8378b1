"""Render clips, encode them once, and keep the latents: the transformer trains on these.

    PYTHONPATH=.:tools python -m train_embedded.latents --vae runs/vae --out runs/latents64 --size 64 --shards 25

Every shard holds 64 clips of training combinations; a trainer may already read while later shards are written.
"""

import argparse
import json
import random
from pathlib import Path

import torch

from train_embedded.checkpoint import load_checkpoint, save_checkpoint
from train_embedded.scene import Words, render, sample_scene, split_words
from train_embedded.vae import load_vae

CLIPS_PER_SHARD = 64
FRAMES = 33
WHOLE = 9
"""Latent frames of a clip."""


def write_shard(vae: torch.nn.Module, path: Path, size: int, seed: int, device: str) -> None:
    """Encode 64 clips of `size`² pixels and write their normalised latents, float16 [64, C, T, H, W]."""
    rng = random.Random(seed)
    words = rng.sample(split_words()[0], CLIPS_PER_SHARD)
    mean, std = (
        torch.tensor(x, device=device)[:, None, None, None] for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = []
    for start in range(0, CLIPS_PER_SHARD, 4):
        clips = torch.stack([render(sample_scene(w, rng), FRAMES, size, size) for w in words[start : start + 4]])
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            encoded = vae.encode(clips.to(device) * 2 - 1).latent_dist.mean.float()
        latents.append(((encoded - mean) / std).half().cpu())
    named = [[w.color, w.shape, w.motion, w.background] for w in words]
    save_checkpoint(path, {"clips": {"latents": torch.cat(latents)}}, {"words": json.dumps(named), "size": size})


class LatentPool:
    """The shards of a folder that exist so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, set[Path]()
        self.latents: list[torch.Tensor] = []
        self.words: list[Words] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the shards that appeared since the last call."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.seen):
            parts, facts = load_checkpoint(path)
            self.latents.extend(parts["clips"]["latents"])
            self.words.extend(Words(*entry) for entry in json.loads(facts["words"]))
            self.seen.add(path)

    def batch(self, clips: int, rng: random.Random, window: int = WHOLE) -> tuple[torch.Tensor, list[Words]]:
        """As many latent frames as `clips` whole clips have, cut from clips drawn at random, `window` from each.

        Returns latents [samples, C, window, H, W] and their words.
        """
        samples = clips * WHOLE // window
        picks = [(rng.randrange(len(self.latents)), rng.randrange(WHOLE - window + 1)) for _ in range(samples)]
        windows = torch.stack([self.latents[clip][:, start : start + window] for clip, start in picks])
        return windows.float(), [self.words[clip] for clip, _ in picks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--shards", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    vae = load_vae(args.vae).to(args.device)
    for shard in range(args.shards):
        path = args.out / f"{shard:04d}.safetensors"
        if not path.exists():
            write_shard(vae, path, args.size, seed=args.size * 10_000 + shard, device=args.device)
            print(f"{path} written", flush=True)


if __name__ == "__main__":
    main()
