"""`generate` with pipelines that are not Wan's: other arguments, packed latents, images, no callback."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import make_text_parts
from families import Family
from families.parts import WIDTH
from pointillist.metrics import compare
from pointillist.pipelines.again import facts_of, request_of
from pointillist.pipelines.call import call_of, makes_images
from pointillist.pipelines.events import Step
from pointillist.pipelines.generate import GenerateRequest, generate
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.outline import outline_of
from pointillist.pipelines.video import read_clip, read_settings

VIDEO = {"frames": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny pipeline with a tokenizer and a text encoder."""

    def make(name):
        pipe = Family(name).pipe
        pipe.register_modules(**make_text_parts(WIDTH))
        if name == "pixart":
            pipe.transformer.register_to_config(sample_size=32)  # it knows sizes for 32, 64 …
        path = tmp_path_factory.mktemp(name)
        pipe.save_pretrained(path)
        return str(path)

    return make


@pytest.mark.parametrize(
    ("name", "size", "ending"),
    [("ltx", VIDEO, "mp4"), ("mochi", {"frames": 7}, "mp4"), ("pixart", {}, "png")],
)
def test_generating(name, size, ending, folder, tmp_path):
    model, events = folder(name), []
    request = GenerateRequest(
        prompt="a red circle", output=tmp_path / "made.mp4", model=model, width=64, height=64, steps=6, seed=4,
        pattern="pooled", density=0.5, compare=True, guidance=3.0, **size,
    )  # fmt: skip
    result = generate(request, events.append)
    assert result.output.name == f"made.{ending}"
    assert {path.suffix for path in result.files.values()} == {f".{ending}"}
    frames, facts = read_clip(result.output), read_settings(result.output)
    assert frames.shape[1:] == (64, 64, 3) and np.isfinite(frames).all()
    assert (facts["width"], facts["height"], facts["steps"], facts["seed"]) == (64, 64, 6, 4)
    assert facts["frames"] == len(frames) and 0.4 < facts["density"] < 0.6
    steps = [event for event in events if isinstance(event, Step) and event.phase == "accelerated: denoising"]
    assert [event.step for event in steps] == list(range(7))
    pipe = load_pipeline(model)
    call = call_of(pipe, width=64, height=64, num_inference_steps=6, num_frames=size.get("frames"), guidance_scale=3.0)
    with torch.no_grad():
        alone = pipe(prompt="a red circle", **call, generator=torch.Generator().manual_seed(4), output_type="np")
    dense = alone.images[:1] if ending == "png" else alone.frames[0]
    least = 45 if ending == "png" else 15  # noise suffers in an MP4
    assert compare(read_clip(result.files["dense"]), dense.astype(np.float64)).psnr > least
    assert makes_images(pipe) == (ending == "png")


def test_an_image_is_made_again_from_its_settings(folder, tmp_path):
    size = {"width": 64, "height": 64, "steps": 2, "seed": 4, "speed": "exact", "warm_up": False}
    first = generate(GenerateRequest("a red circle", tmp_path / "a.PNG", model=folder("pixart"), **size)).output
    assert first.name == "a.PNG"
    again = replace(request_of(first, facts_of(first)), output=tmp_path / "b.png", warm_up=False)
    assert np.array_equal(read_clip(generate(again).output), read_clip(first))
    with pytest.raises(ValueError, match="PixArtSigmaPipeline cannot be repainted"):
        generate(replace(again, keep=tmp_path / "kept.safetensors"))


def test_qwen_image_is_guided_as_in_its_own_examples():
    pipe = Family("qwen-image").pipe
    assert call_of(pipe)["negative_prompt"] == " " and "true_cfg_scale" not in call_of(pipe)
    asked = call_of(pipe, guidance_scale=3.0, negative_prompt="blur")
    assert asked["true_cfg_scale"] == 3.0 and asked["negative_prompt"] == "blur" and "guidance_scale" not in asked
    assert "negative_prompt" not in call_of(Family("flux").pipe)


def test_what_makes_images():
    import diffusers

    kinds = {
        "SanaVideoPipeline": False, "LattePipeline": False, "WanVideoToVideoPipeline": False, "FluxPipeline": True,
        "WanPipeline": False, "PixArtSigmaPipeline": True,
    }  # fmt: skip
    assert {name: makes_images(object.__new__(getattr(diffusers, name))) for name in kinds} == kinds


def test_what_a_pipeline_does_not_take_is_said(folder, tmp_path):
    model = folder("pixart")
    with pytest.raises(ValueError, match="PixArtSigmaPipeline takes no frames"):
        generate(GenerateRequest(prompt="a", output=tmp_path / "a.png", model=model, frames=9))
    with pytest.raises(ValueError, match="not known here; the command line runs it"):
        outline_of(model)


def test_what_a_pipeline_needs_beside_the_prompt_is_said(tmp_path):
    pipe = Family("wan-i2v").pipe
    with pytest.raises(ValueError, match=r"WanImageToVideoPipeline needs image .* call it from Python"):
        generate(GenerateRequest(prompt="a", output=tmp_path / "a.mp4"), load=lambda *args, **more: pipe)
    assert not list(tmp_path.iterdir())


def test_defaults_are_those_of_the_pipeline(tiny_folder):
    assert call_of(Family("ltx").pipe) == {
        "height": 512, "width": 704, "num_frames": 161, "num_inference_steps": 50, "guidance_scale": 3,
    }  # fmt: skip
    assert call_of(Family("flux").pipe, height=64) == {
        "height": 64, "num_inference_steps": 28, "guidance_scale": 3.5,
    }  # fmt: skip
    assert json.dumps(outline_of(str(tiny_folder)).call) == json.dumps(call_of(load_pipeline(str(tiny_folder))))
