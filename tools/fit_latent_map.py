"""Fit the map from an autoencoder's latents to colours, for previews: into `pipelines/latent_maps.json`.

    PYTHONPATH=.:tools python tools/fit_latent_map.py                 the embedded model
    PYTHONPATH=. python tools/fit_latent_map.py MODEL CLIP.mp4 …       another one, by clips that are like what it makes

A latent stands for a square of pixels in one or several frames; the map is the linear one with the least squared error
to their mean colour.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

from pointillist.pipelines.latent_preview import MAPS, fingerprint, fit, neighbours
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.video import read_clip

CLIPS = 40
SIDE, FRAMES = 64, 17


def rendered() -> list[np.ndarray]:
    """Clips [F, H, W, 3] of what the embedded model draws."""
    from train_embedded.scene import all_words, render, sample_scene

    chance = random.Random(0)
    scenes = (sample_scene(words, chance) for words in chance.sample(all_words(), CLIPS))
    return [render(scene, FRAMES, SIDE, SIDE).permute(1, 2, 3, 0).numpy() for scene in scenes]


def pairs(vae, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents [N, 27 · C], as a pipeline holds them, each with all around it; and mean colours [N, 3] of a clip
    [F, H, W, 3] in [0, 1]."""
    space, time = vae.config.scale_factor_spatial, vae.config.scale_factor_temporal
    frames, height, width = ((len(clip) - 1) // time * time + 1, *(n // space * space for n in clip.shape[1:3]))
    clip = clip[:frames, :height, :width].astype(np.float32)
    video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()[0]
    mean, deviation = (torch.tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    latents = (latents - mean) / deviation
    squares = clip.reshape(frames, height // space, space, width // space, space, 3).mean((2, 4))
    later = squares[1:].reshape(-1, time, *squares.shape[1:]).mean(1)  # the first latent is of the first frame alone
    colors = np.concatenate([squares[:1], later])
    around = neighbours(latents.permute(1, 2, 3, 0).numpy())
    return around.reshape(-1, around.shape[-1]), colors.reshape(-1, 3)


def main(model: str = "embedded", *clips: str) -> None:
    vae = load_pipeline(model, device="cpu").vae
    found = [pairs(vae, clip) for clip in (map(read_clip, map(Path, clips)) if clips else rendered())]
    latents, colors = (np.concatenate(each) for each in zip(*found, strict=True))
    fitted, explained = fit(latents, colors)
    maps = json.loads(MAPS.read_text(encoding="utf-8"))
    maps[fingerprint(vae)] = {
        "of": model, "explained": round(explained, 4), "weight": fitted.weight.round(3).tolist(),
        "bias": fitted.bias.round(4).tolist(),
    }  # fmt: skip
    MAPS.write_text(json.dumps(maps) + "\n", encoding="utf-8")
    print(f"{model}: {explained:.1%} of the variance of {len(colors)} mean colours, into {MAPS}")


if __name__ == "__main__":
    main(*sys.argv[1:])
