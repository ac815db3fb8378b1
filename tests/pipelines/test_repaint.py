"""Repainting on a tiny Wan: what lies outside the mask stays bit by bit, and only the mask is computed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import save_file

from pointillist.metrics import psnr
from pointillist.pipelines import load
from pointillist.pipelines import repaint as module
from pointillist.pipelines.generate import GenerateRequest, generate
from pointillist.pipelines.kept import load_kept
from pointillist.pipelines.mask import read_mask, save_mask, soft_edge, tokens_touched
from pointillist.pipelines.repaint import RepaintRequest, predict, repaint
from pointillist.pipelines.video import Clip, OutputError, read_clip, read_settings, to_pixels, write_clips

PROMPT, HALF, TOKENS = "a red circle", "0,0,64,32", 48


def make(folder, tiny_folder, **changes):
    """A clip of 9 frames of 64×64 pixels, a grid of 3×4×4 tokens, and what was kept of it."""
    request = GenerateRequest(
        prompt=PROMPT, output=folder / "clip.gif", model=str(tiny_folder), width=64, height=64, frames=9, steps=6,
        seed=3, **{"keep": folder / "clip.safetensors", "speed": "exact", **changes},
    )  # fmt: skip
    return generate(request)


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"), tiny_folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Repaint a clip; the result, and the pixels that went to the encoder."""
    clips = []

    def write(given, fps):
        clips.extend(given.values())
        write_clips(given, fps)

    monkeypatch.setattr(module, "write_clips", write)

    def call(clip, prompt="black circle on red", mask=HALF, **changes):
        given = dict(clip=clip, mask=mask, prompt=prompt, output=tmp_path / "new.gif")
        return repaint(RepaintRequest(**{**given, **changes})), to_pixels(clips[-1].frames)

    return call


@pytest.fixture
def rows(monkeypatch):
    """How many tokens the first block was given, call by call."""
    seen, load_pipeline = [], load.load_pipeline

    def loaded(*args, **kwargs):
        pipe = load_pipeline(*args, **kwargs)
        pipe.transformer.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        return pipe

    monkeypatch.setattr(load, "load_pipeline", loaded)
    return seen


def kept_of(result):
    return load_kept(Path(result.facts["kept"]), result.facts)


@pytest.mark.parametrize("mask", [HALF, "5,9,23,30", "16,16,16,32,3-6"])
def test_outside_nothing_changes_and_inside_something_does(made, run, mask):
    result, pixels = run(made.output, mask=mask, strength=1.0)
    before, inside = kept_of(made).pixels, read_mask(mask, 9, 64, 64)
    assert np.array_equal(pixels[~inside], before[~inside]) and result.facts["psnr_outside"] == 100.0
    assert (pixels[inside] != before[inside]).any() and result.facts["psnr_inside"] < 100
    assert read_settings(result.output) == result.facts and result.facts["area"] == round(float(inside.mean()), 4)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_the_same_prompt_is_the_same_clip(tiny_folder, tmp_path, run, monkeypatch, sampler, strength):
    load_pipeline = load.load_pipeline

    def loaded(*args, **kwargs):
        pipe = load_pipeline(*args, **kwargs)
        if sampler == "unipc":
            pipe.scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            )
        return pipe

    monkeypatch.setattr(load, "load_pipeline", loaded)
    made = make(tmp_path, tiny_folder)
    before = kept_of(made).pixels
    _, exact = run(made.output, PROMPT, strength=strength, refresh=1)
    assert np.array_equal(exact, before)
    _, near = run(made.output, PROMPT, strength=strength, refresh=3)
    assert psnr(near / 255, before / 255) > 25


@pytest.mark.parametrize(("mask", "share"), [("0,0,64,32", 0.5), ("0,0,32,32", 0.25), ("16,0,16,64,1-8", 1 / 6)])
def test_work_is_in_proportion_to_the_area(made, run, rows, mask, share):
    result, _ = run(made.output, mask=mask, strength=4 / 6, refresh=3)
    masked = round(share * TOKENS)
    assert rows == [n for n in (TOKENS, masked, masked, TOKENS) for _ in ("cond", "uncond")]
    assert result.facts["steps_run"] == {"kept": 2, "all": 2, "masked": 2}
    assert 2 * result.facts["tokens_computed"] == sum(rows) and result.facts["tokens_masked"] == masked
    assert result.facts["kinds"] == ["kept", "kept", "all", "masked", "masked", "all"]


def test_the_cost_is_predicted_from_the_clips_own_times(made, run, tmp_path):
    request = RepaintRequest(made.output, HALF, "black", tmp_path / "new.gif", strength=4 / 6, refresh=3)
    found, facts = predict(request), made.facts
    result, _ = run(made.output, strength=4 / 6, refresh=3)
    assert found.area == 0.5 and found.computed == pytest.approx(result.facts["computed"], abs=1e-4)
    step = np.median(facts["step_seconds"])
    around = facts["seconds"]["total"] - facts["seconds"]["denoise"]
    assert found.seconds == pytest.approx(found.computed * 6 * step + around) and found.again == 0
    lost = predict(replace(request, clip=make_without_kept(made.output, tmp_path)))
    assert lost.again == facts["seconds"]["total"] and lost.seconds == pytest.approx(found.seconds + lost.again)
    kept = run(made.output, keep=tmp_path / "new.safetensors")[0]
    assert predict(replace(request, clip=kept.output)).computed == found.computed
    save_mask(np.zeros((64, 64), bool), tmp_path / "blank.png")
    with pytest.raises(ValueError, match="is empty"):
        predict(replace(request, mask=str(tmp_path / "blank.png")))


def make_without_kept(clip, folder):
    """The same clip, of which nothing was kept."""
    facts = {name: value for name, value in read_settings(clip).items() if name != "kept"}
    write_clips({folder / "lost.gif": Clip(read_clip(clip), facts)}, facts["fps"])
    return folder / "lost.gif"


def test_tokens_outside_keep_their_velocities(made, run, tmp_path):
    result, _ = run(made.output, strength=0.5, keep=tmp_path / "new.safetensors")
    before, after = kept_of(made).velocities, kept_of(result).velocities
    assert torch.equal(before[:3], after[:3]) and torch.equal(before[..., 4:, :], after[..., 4:, :])
    assert (before[3:, ..., :4, :] != after[3:, ..., :4, :]).float().mean() > 0.9
    assert result.facts["kept_bytes"] == sum(x.nbytes for x in (after, kept_of(result).pixels))


def test_a_repainted_clip_is_repainted_again(made, run, tmp_path):
    first, once = run(made.output, keep=tmp_path / "first.safetensors", output=tmp_path / "first.gif")
    second, twice = run(first.output, "a a a", mask="0,48,64,16")
    assert np.array_equal(twice[:, :48], once[:, :48]) and not np.array_equal(twice, once)
    assert second.facts["repaint"]["prompt"] == first.facts["prompt"] != made.facts["prompt"]
    (tmp_path / "first.safetensors").unlink()
    with pytest.raises(OutputError, match="was itself repainted"):
        run(first.output)


def test_a_clip_that_was_not_kept_is_generated_again(made, tiny_folder, tmp_path, run):
    bare = make(tmp_path, tiny_folder, keep=None, speed="fast")
    phases = []
    request = RepaintRequest(bare.output, HALF, "black", tmp_path / "again.gif")
    again = repaint(request, lambda event: phases.append(event.phase))
    assert again.facts["source"] == "generated again" and again.facts["seconds"]["again"] > 0
    assert any("generated again" in phase for phase in phases) and not again.facts["fallbacks"]
    kept = make(tmp_path, tiny_folder, speed="fast")
    result, pixels = run(kept.output, "black")
    assert result.facts["source"] == "kept" and result.facts["seconds"]["again"] == 0
    write_clips({tmp_path / "kept.gif": Clip(pixels / 255, again.facts)}, 16)
    assert (tmp_path / "kept.gif").read_bytes() == (tmp_path / "again.gif").read_bytes()


def test_masks(tmp_path):
    drawn = np.zeros((64, 96), np.uint8)
    drawn[10:20, 30:50] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    frames = [Image.fromarray(drawn), Image.fromarray(drawn.T.copy()).resize((96, 64)), Image.fromarray(drawn * 0)]
    frames[0].save(tmp_path / "mask.gif", save_all=True, append_images=frames[1:], duration=100)
    rectangle = read_mask("30,10,20,10", 3, 64, 96)
    assert np.array_equal(read_mask(str(tmp_path / "mask.png"), 3, 64, 96), rectangle) and rectangle.sum() == 600
    clip = read_mask(str(tmp_path / "mask.gif"), 3, 64, 96)
    assert np.array_equal(clip[0], rectangle[0]) and not clip[2].any() and not np.array_equal(clip[0], clip[1])
    assert read_mask("30, 10, 20, 10, 1-2", 3, 64, 96).sum((1, 2)).tolist() == [0, 200, 200]


def test_tokens_are_those_that_a_pixel_touches():
    for _ in range(20):
        mask = np.zeros((9, 64, 96), dtype=bool)
        frame, y, x = (int(torch.randint(n, ())) for n in mask.shape)
        mask[frame, y, x] = True
        touched = tokens_touched(mask, (3, 4, 6))
        assert np.argwhere(touched).tolist() == [[(frame + 3) // 4, y // 16, x // 16]]
    assert tokens_touched(np.ones((1, 32, 32), dtype=bool), (1, 2, 2)).all()


def test_the_edge_fades_inside_the_mask_alone():
    mask = read_mask("10,0,40,64", 1, 64, 96)
    edge = soft_edge(mask, 4)
    assert edge[~mask].max() == 0 and np.allclose(edge[0, 30, 8:16], [0, 0, 0.25, 0.5, 0.75, 1, 1, 1])
    assert np.array_equal(edge[0, 0], edge[0, 30])  # the border of the picture is no edge


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "0,0,64,64"}, "is the whole clip; generate it anew"),
        ({"mask": "0,0,0,9"}, "is empty"),
        ({"mask": "0,0,65,9"}, "64×64 pixels and has the frames 0 to 8"),
        ({"mask": "0,0,9,9,4-9"}, "does not lie in the clip"),
        ({"mask": "nowhere.png"}, "is no file, and no rectangle like"),
        ({"mask": "SMALL"}, "1 frames of 9×9 pixels; the clip has 9 of 64×64"),
        ({"clip": Path("absent.gif")}, "there is no file 'absent.gif'"),
        ({"clip": "SMALL"}, "carries no settings"),
        ({"kept": Path("absent.safetensors")}, "there is no file"),
        ({"kept": Path("absent.pt")}, "must end in .safetensors"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"strength": 0.0}, "strength 0.0 is not possible"),
        ({"strength": float("nan")}, "strength nan is not possible"),
        ({"refresh": 0}, "refresh 0 is not possible"),
    ],
)
def test_what_cannot_be_is_told(made, run, tmp_path, changes, message):
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(tmp_path / "small.png")
    swapped = {"mask": str(tmp_path / "small.png"), "clip": tmp_path / "small.png"}
    changes = {name: swapped[name] if value == "SMALL" else value for name, value in changes.items()}
    with pytest.raises((ValueError, OutputError), match=message):
        run(**{"clip": made.output, **changes})
    assert not (tmp_path / "new.gif").exists()


def test_kept_files_that_do_not_fit_are_refused(made, tiny_folder, run, tmp_path):
    other = make(tmp_path, tiny_folder, guidance=2.0)
    with pytest.raises(OutputError, match="is of another clip: guidance differ"):
        run(made.output, kept=Path(other.facts["kept"]))
    (tmp_path / "bytes.safetensors").write_bytes(b"nonsense")
    with pytest.raises(OutputError, match="is not what `generate --keep` writes"):
        run(made.output, kept=tmp_path / "bytes.safetensors")
    tensors = {"velocities": torch.zeros(6, 3), "sigmas": torch.ones(6), "pixels": torch.zeros(1, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "shapes.safetensors", {"pointillist": json.dumps(made.facts)})
    with pytest.raises(OutputError, match="do not fit its clip"):
        run(made.output, kept=tmp_path / "shapes.safetensors")


def test_settings_that_generate_never_wrote_are_refused(made, run, tmp_path):
    frames = kept_of(made).pixels / 255
    for change, message in (
        ({"request": None}, "are none of `generate`"),
        ({"steps": "many"}, "are none of `generate`"),
        ({"model": "nowhere", "kept": None}, "there is no model 'nowhere'"),
    ):
        write_clips({tmp_path / "bad.gif": Clip(frames, made.facts | change)}, 16)
        with pytest.raises((OutputError, ValueError), match=message):
            run(tmp_path / "bad.gif")
