"""A preview looks like the clip, without decoding it."""

import numpy as np
import torch

from pointillist.metrics import psnr
from pointillist.pipelines.latent_preview import clean, fit, look, map_of, neighbours, principal
from pointillist.pipelines.load import load_pipeline


def test_the_embedded_model_has_a_map_that_shows_its_clips():
    pipe = load_pipeline("embedded")
    prompt, size = "a red circle moving left on black", {"height": 64, "width": 64, "num_frames": 17}
    seeded = {"generator": torch.Generator().manual_seed(2), "num_inference_steps": 8, **size}
    latents = pipe(prompt, output_type="latent", **seeded).frames
    seen = look(pipe, latents) / 255
    with torch.no_grad():
        config = pipe.vae.config
        mean, deviation = (torch.tensor(config[n]).view(1, -1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
        clip = pipe.vae.decode(latents * deviation + mean).sample[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5
    squares = clip.clip(0, 1).reshape(17, 8, 8, 8, 8, 3).mean((2, 4))
    wanted = np.concatenate([squares[:1], squares[1:].reshape(4, 4, 8, 8, 3).mean(1)])
    assert seen.shape == wanted.shape
    assert psnr(wanted, seen) > psnr(wanted, np.broadcast_to(wanted.mean((0, 1, 2)), wanted.shape)) + 4
    assert map_of(pipe) is not None and look(pipe, torch.zeros(1, 100, 64)) is None  # packed into tokens


def test_other_models_show_where_latents_differ(pipe):
    latents = torch.zeros(1, 16, 3, 8, 8) + 0.01 * torch.randn(1, 16, 3, 8, 8)
    latents[0, :, :, 2:5, 2:5] += torch.randn(16)[:, None, None, None]
    seen = look(pipe, latents).astype(float)
    inside, outside = seen[:, 2:5, 2:5].reshape(-1, 3).mean(0), seen[:, 6:].reshape(-1, 3).mean(0)
    assert map_of(pipe) is None and abs(inside - outside).max() > 60
    assert principal(latents[0, :1].numpy()).frames(latents[0, :1].numpy()).shape == (3, 8, 8, 3)


def test_fitting_finds_a_linear_map():
    generator = np.random.default_rng(0)
    latents, truth = generator.normal(size=(4, 6, 5, 8)), generator.normal(size=(27 * 8, 3))
    around = neighbours(latents)
    assert around.shape == (4, 6, 5, 216) and (around[..., 13 * 8 : 14 * 8] == latents).all()
    assert (around[1:, :, :, 4 * 8 : 5 * 8] == latents[:-1]).all()  # the one before in time
    many = generator.normal(size=(500, 216))
    found, explained = fit(many, many @ truth + 0.25)
    assert explained > 0.999999 and np.allclose(found.weight, truth) and np.allclose(found.bias, 0.25)


def test_noise_is_taken_away_along_the_velocity(pipe):
    clip, noise = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4)
    at, velocity = 0.3 * noise + 0.7 * clip, noise - clip
    assert torch.allclose(clean(at, velocity, 0.3, pipe.scheduler), clip, atol=1e-5)
    assert clean(at, None, 0.3, pipe.scheduler) is at
