"""A clip several times longer than the embedded model was trained for, by one process or by several.

    python benchmarks/long_clip.py --output one
    torchrun --nproc-per-node 2 benchmarks/long_clip.py --output two --ulysses 2

Under `linear_plan` every query sees as many frames as the model knows, so costs grow linearly with the clip. Writes the
frames, a PNG of them, and how large the changes are from frame to frame.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import pointillist
from pointillist.pipelines.job import together
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.longer import linear_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--prompt", default="a red circle moving right on black")
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--plan", default="linear", help="linear, none (every query sees everything), auto or a file")
    parser.add_argument("--positions", choices=("known", "true"), default="known", help="where the frames are placed")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    wish = parser.parse_args()
    pipe = load_pipeline("embedded")
    if wish.positions == "true":
        pipe.transformer.rope._forward_hooks.clear()
    latent_frames = (wish.frames - 1) // pipe.vae_scale_factor_temporal + 1
    plan = linear_plan(latent_frames) if wish.plan == "linear" else wish.plan
    with together(pipe, wish.ulysses, wish.ring) as job:
        started, ended = time.perf_counter(), []

        def after_step(pipe: object, step: int, timestep: object, tensors: dict[str, object]) -> dict[str, object]:
            ended.append(time.perf_counter())
            return tensors

        with pointillist.accelerate(pipe, plan) as handle:
            frames = pipe(
                wish.prompt, height=wish.size, width=wish.size, num_frames=wish.frames, guidance_scale=5.0,
                num_inference_steps=wish.steps, generator=torch.Generator().manual_seed(wish.seed), output_type="np",
                callback_on_step_end=after_step,
            ).frames[0]  # fmt: skip
            report = handle.report()
        if job.rank:
            return
        wish.output.mkdir(parents=True, exist_ok=True)
        np.save(wish.output / "frames.npy", frames)
        changes = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        grounds = np.median(frames.reshape(len(frames), -1, 3), axis=1)
        facts = {
            "frames": len(frames), "seconds": time.perf_counter() - started,
            "decoding": time.perf_counter() - ended[-1], "tokens": report.tokens, "plan": report.plan,
            "density": report.density, "largest_change": float(changes[1:].max()),
            "first_ground_off": float(np.abs(grounds[0] - grounds[len(grounds) // 2]).max()),
            "changes": [round(float(change), 4) for change in changes],
        }  # fmt: skip
        (wish.output / "facts.json").write_text(json.dumps(facts))
        _strip(frames, wish.output / "strip.png")
        print(json.dumps({name: value for name, value in facts.items() if name != "changes"}))


def _strip(frames: np.ndarray, path: Path, columns: int = 13) -> None:
    """Every fourth frame, in rows."""
    from PIL import Image

    shown = (frames[::4] * 255).round().astype(np.uint8)
    rows = -(-len(shown) // columns)
    padded = np.concatenate([shown, np.zeros((rows * columns - len(shown), *shown.shape[1:]), np.uint8)])
    height, width = shown.shape[1:3]
    grid = padded.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(grid.reshape(rows * height, columns * width, 3)).save(path)


if __name__ == "__main__":
    main()
