"""A preview looks like the clip, without decoding it."""

import random

import numpy as np
import torch

from fit_latent_map import pairs
from pointillist.metrics import psnr
from pointillist.pipelines.latent_preview import clean, fit, look, map_of, neighbours, principal
from pointillist.pipelines.load import load_pipeline
from train_embedded.scene import Words, render, sample_scene


def test_the_embedded_model_has_a_map_that_shows_its_clips():
    pipe = load_pipeline("embedded")
    errors = {"map": [], "mean": []}
    for number, words in enumerate((("green", "circle", "growing", "black"), ("red", "square", "left", "white"),
                                    ("yellow", "circle", "still", "navy"))):  # fmt: skip
        clip = render(sample_scene(Words(*words), random.Random(number)), 17, 64, 64).permute(1, 2, 3, 0).numpy()
        around, wanted = pairs(pipe.vae, clip)
        latents = torch.from_numpy(around[:, 13 * 16 : 14 * 16].reshape(5, 8, 8, 16)).permute(3, 0, 1, 2)[None]
        seen, wanted = look(pipe, latents) / 255, wanted.reshape(5, 8, 8, 3)
        drawn = np.abs(wanted - wanted[0, 0, 0]).sum(-1) > 0.15
        assert psnr(wanted[~drawn], seen[~drawn]) > 20
        errors["map"].append((wanted - seen)[drawn])
        errors["mean"].append((wanted - wanted.mean((0, 1, 2)))[drawn])
    of_map, of_mean = (np.square(np.concatenate(each)).mean() ** 0.5 for each in errors.values())
    assert of_map < 0.75 * of_mean
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
