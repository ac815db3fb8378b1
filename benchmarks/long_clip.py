"""A clip several times longer than the embedded model was trained for, by one process or by several.

    python benchmarks/long_clip.py --output one
    torchrun --nproc-per-node 2 benchmarks/long_clip.py --output two --ulysses 2

Every query sees the frames around its own and a few reference frames of the whole clip (the pattern `tile`), together
as many as the model knows; references move on with the steps. Costs grow linearly with the clip. Writes a PNG of
frames, the frames themselves, and how large the changes are from frame to frame.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import pointillist
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.schedule import Schedule
from pointillist.pipelines.job import together
from pointillist.pipelines.load import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--prompt", default="a red circle moving right on black")
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--known", type=int, default=9, help="latent frames that a query sees")
    parser.add_argument("--dense", action="store_true", help="every query sees everything")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    wish = parser.parse_args()
    pipe = load_pipeline("embedded")
    latent_frames = (wish.frames - 1) // pipe.vae_scale_factor_temporal + 1
    plan = "none" if wish.dense else window_and_references(min(1.0, wish.known / latent_frames))
    with together(pipe, wish.ulysses, wish.ring) as job:
        started = time.perf_counter()
        with pointillist.accelerate(pipe, plan) as handle:
            frames = pipe(
                wish.prompt, height=wish.size, width=wish.size, num_frames=wish.frames, guidance_scale=5.0,
                num_inference_steps=wish.steps, generator=torch.Generator().manual_seed(wish.seed), output_type="np",
            ).frames[0]  # fmt: skip
            report = handle.report()
        if job.rank:
            return
        wish.output.mkdir(parents=True, exist_ok=True)
        np.save(wish.output / "frames.npy", frames)
        changes = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        facts = {
            "frames": len(frames), "seconds": time.perf_counter() - started, "tokens": report.tokens,
            "density": report.density, "changes": [round(float(change), 4) for change in changes],
        }  # fmt: skip
        (wish.output / "facts.json").write_text(json.dumps(facts))
        _strip(frames, wish.output / "strip.png")
        print(json.dumps({name: value for name, value in facts.items() if name != "changes"}))


def window_and_references(density: float) -> Plan:
    """In all steps and heads: `density` of the frames, a third of them references that move on."""
    return Plan(
        name=f"window and references at {density:.2f}", table=((Rule("tile", density, (("rotate", True),)),),),
        schedule=Schedule(), block=64, break_even=False,
    )  # fmt: skip


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
