"""Clips longer than the model was trained on: where their frames are placed, and what a linear plan sees."""

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from conftest import make_transformer
from pointillist.accel.patterns.geometry import Places
from pointillist.accel.patterns.tile import Tile
from pointillist.pipelines.call import check_size
from pointillist.pipelines.generate import GenerateRequest, generate
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.longer import keep_positions_in_range, linear_plan, note_on_length, positions


def tables(transformer, frames):
    return transformer.rope(torch.zeros(1, 16, frames, 4, 6))


def test_a_clip_that_the_model_knows_stays_as_it_is():
    plain, placed = make_transformer(), make_transformer()
    keep_positions_in_range(placed, known=5)
    for frames in (1, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(tables(plain, frames), tables(placed, frames), strict=True))


def test_placing_is_undone_traced_and_refused_where_the_table_is_a_part():
    transformer = make_transformer()
    before, undo = tables(transformer, 12), keep_positions_in_range(transformer, 5)
    placed = tables(transformer, 12)
    assert not torch.equal(before[0], placed[0])
    traced = torch.compile(transformer.rope, backend="eager", fullgraph=True)(torch.zeros(1, 16, 12, 4, 6))
    assert all(torch.equal(a, b) for a, b in zip(placed, traced, strict=True))
    forward = transformer.rope.forward
    transformer.rope.forward = lambda x: tuple(table[:, : table.shape[1] // 2] for table in forward(x))
    with pytest.raises(RuntimeError, match=r"parallelize\(\)"):
        tables(transformer, 12)
    transformer.rope.forward = forward
    undo()
    assert all(torch.equal(a, b) for a, b in zip(before, tables(transformer, 12), strict=True))


def test_a_longer_clip_is_placed_where_the_known_one_was():
    known, frames = 5, 12
    plain, placed = make_transformer(), make_transformer()
    keep_positions_in_range(placed, known)
    cos, sin = get_1d_rotary_pos_embed(
        plain.rope.t_dim, positions(frames, known), use_real=True, repeat_interleave_real=True,
        freqs_dtype=torch.float64,
    )  # fmt: skip
    for found, plain_table, wanted in zip(tables(placed, frames), tables(plain, frames), (cos, sin), strict=True):
        assert found.shape == plain_table.shape and found.dtype == plain_table.dtype
        by_frame = found[0, :, 0].view(frames, 6, -1)
        assert torch.allclose(by_frame[..., : plain.rope.t_dim], wanted[:, None].float(), atol=1e-5)
        assert torch.equal(found[..., plain.rope.t_dim :], plain_table[..., plain.rope.t_dim :])  # height and width


@pytest.mark.parametrize(("frames", "known"), [(10, 9), (33, 9), (100, 21)])
def test_positions_are_in_the_known_range_and_the_first_frame_keeps_its_distance(frames, known):
    found = positions(frames, known)
    assert found[:2].tolist() == [0, 1] and float(found[-1]) == pytest.approx(known - 1)
    between = found[1:].diff()
    assert torch.allclose(between, between[0].expand_as(between)) and 0 < float(between[0]) < 1
    assert torch.equal(positions(known, known), torch.arange(known, dtype=torch.float64))


def test_a_linear_plan_sees_as_many_frames_of_any_clip_and_both_its_ends():
    for frames in (10, 17, 33, 50):
        plan = linear_plan(frames)
        (rule,), grid = plan.table[0], (frames, 2, 2)
        pattern = Tile.at_density(rule.density, grid, block=64, **dict(rule.options))
        t = torch.arange(frames)
        zero = torch.zeros_like(t)
        seen = pattern.wants(Places(t[:, None], zero[:, None], zero[:, None], grid), Places(t, zero, zero, grid))
        assert set(seen.sum(1).tolist()) == {10} and bool(seen[:, [0, 1, -1]].all()) and bool(seen.diagonal().all())


def test_the_embedded_model_makes_longer_clips_and_says_what_is_done(tmp_path):
    request = GenerateRequest(
        "a red circle moving right on black", tmp_path / "long.png", width=64, height=64, frames=53, steps=2, seed=1,
        speed="exact", warm_up=False,
    )  # fmt: skip
    facts = generate(request).facts
    assert facts["frames"] == 53 and facts["grid"] == [14, 8, 8]
    transformer = load_pipeline("embedded").transformer
    assert facts["fallbacks"] == list(note_on_length(transformer, 14)) and "14 latent frames" in facts["fallbacks"][0]
    assert note_on_length(transformer, 9) == () == note_on_length(make_transformer(), 14)
    with pytest.raises(ValueError, match="133 frames are not possible; the embedded model makes 17 to 129"):
        check_size(load_pipeline("embedded"), 64, 64, 133)


def test_the_first_picture_of_a_longer_clip_has_the_colours_of_the_others():
    def ground(pipe):
        frames = pipe(
            "a red circle moving right on black", height=64, width=64, num_frames=49, num_inference_steps=10,
            guidance_scale=5.0, generator=torch.Generator().manual_seed(3), output_type="np",
        ).frames[0]  # fmt: skip
        return np.median(frames[[0, 24]].reshape(2, -1, 3), axis=1)

    pipe = load_pipeline("embedded")
    first, inner = ground(pipe)
    assert np.abs(first - inner).max() < 0.1
    pipe.transformer.rope._forward_hooks.clear()
    first, inner = ground(pipe)
    assert np.abs(first - inner).max() > 0.2
