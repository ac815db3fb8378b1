"""The training tools: scenes, the judge, and that training resumes."""

import random

import numpy as np
import pytest
import torch

from pointillist.pipelines.embedded.vocabulary import COLORS, unknown_words
from train_embedded.checkpoint import load_checkpoint
from train_embedded.judge import judge
from train_embedded.scene import all_words, free_caption, render, sample_scene, split_words
from train_embedded.text import build_text_encoder, build_tokenizer, teach_words


@pytest.mark.parametrize("size", [64, 128])
def test_the_judge_sees_what_was_drawn(size):
    rng = random.Random()
    for words in rng.sample(all_words(), 40):
        clip = render(sample_scene(words, rng), 33, size, size).permute(1, 2, 3, 0).numpy()
        assert judge(clip) == words


def test_the_judge_sees_nothing_in_an_empty_clip():
    assert judge(np.full((9, 64, 64, 3), 0.5)) is None


def test_captions_use_known_words_only():
    rng = random.Random()
    for words in all_words():
        assert unknown_words(free_caption(words, rng)) == []
    assert unknown_words("A purple circle, moving sideways; purple!") == ["purple", "sideways"]


def test_objects_stay_in_the_frame_and_have_their_color():
    rng = random.Random()
    for words in rng.sample(all_words(), 60):
        clip = render(sample_scene(words, rng), 9, 64, 64)
        ground = clip[:, :, :1, :1]
        rim = torch.cat([clip[..., 0], clip[..., -1]], -1)
        assert (rim - ground[..., 0]).abs().max() < 0.25, words  # at most an antialiased corner touches it
        assert (clip - torch.tensor(COLORS[words.color])[:, None, None, None]).abs().amax(0).min() < 1e-6


def test_held_out_prompts_are_never_trained_on():
    training, held_out = split_words()
    assert len(held_out) >= 64 and not set(training) & set(held_out)
    assert split_words() == (training, held_out)


@pytest.mark.slow
def test_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    from train_embedded import latents, transformer, vae

    vae.train(tmp_path / "vae", steps=2, batch=1, rate=1e-3, device="cpu", seed=0)
    monkeypatch.setattr(latents, "CLIPS_PER_SHARD", 4)
    latents.write_shard(vae.load_vae(tmp_path / "vae"), tmp_path / "latents/0.safetensors", 64, 0, "cpu")
    monkeypatch.setattr(transformer, "teach_words", lambda *args, **kwargs: 0.0)
    options = dict(latents=[tmp_path / "latents"], batch=[2], device="cpu", seed=0)
    transformer.train(tmp_path / "run", steps=2, rate=1e-3, final_rate=1e-4, **options)
    before, _ = load_checkpoint(tmp_path / "run" / "last.safetensors")
    transformer.train(tmp_path / "run", steps=4, rate=0, final_rate=0, **options)  # goes on, and changes nothing
    after, facts = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert facts["step"] == 4 and facts["begun"] == 2
    assert all(torch.equal(after["weights"][name], before["weights"][name]) for name in before["weights"])
    transformer.train(tmp_path / "run", steps=6, rate=1e-3, final_rate=1e-3, **options)
    moved, _ = load_checkpoint(tmp_path / "run" / "last.safetensors")
    text, rest = "text_encoder.", "transformer.blocks.0.ffn.net.2.weight"
    assert all(torch.equal(moved["weights"][n], before["weights"][n]) for n in before["weights"] if n.startswith(text))
    assert not torch.equal(moved["weights"][rest], before["weights"][rest])


def test_the_text_encoder_learns_to_state_the_scene():
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(len(tokenizer))
    assert teach_words(tokenizer, encoder, steps=150) > 0.9
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
