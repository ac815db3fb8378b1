"""Generate from held-out prompts and decide by image analysis whether each attribute is right.

    PYTHONPATH=.:tools python -m train_embedded.evaluate --prompts 64 --size 64 --output runs/evaluation64

Writes `results.json` and a strip of five frames after every clip, so that an interrupted evaluation goes on where it
stopped, and `contact_sheet.png` with the first 16 strips.
"""

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from diffusers import WanPipeline

from pointillist.pipelines.embedded import EMBEDDED_FOLDER
from train_embedded.judge import judge
from train_embedded.scene import split_words

ATTRIBUTES = ("color", "background", "motion", "shape")
SHEET_CLIPS = 16


def generate_clip(pipe: WanPipeline, prompt: str, size: int, steps: int, guidance: float, seed: int) -> np.ndarray:
    """Frames float32 [F, H, W, 3] in [0, 1]."""
    return pipe(
        prompt, height=size, width=size, num_frames=33, num_inference_steps=steps, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed), output_type="np",
    ).frames[0]  # fmt: skip


def summarise(clips: list[dict]) -> dict[str, float]:
    """Share of clips in which each attribute, and all of them at once, are right."""
    right = {
        name: [clip["seen"] is not None and clip["seen"][name] == clip["words"][name] for clip in clips]
        for name in ATTRIBUTES
    }
    shares = {name: sum(values) / len(values) for name, values in right.items()}
    return {**shares, "all": sum(all(row) for row in zip(*right.values(), strict=True)) / len(clips)}


def contact_sheet(strips: list[Path]) -> np.ndarray:
    """Two columns of strips, each five frames side by side: uint8 [H, W, 3]."""
    padded = [np.pad(iio.imread(strip), ((2, 2), (2, 6), (0, 0)), constant_values=255) for strip in strips]
    return np.concatenate([np.concatenate(padded[i : i + 2], axis=1) for i in range(0, len(padded) - 1, 2)])


def weights_digest(model: Path) -> str:
    """SHA-256 of the transformer's weights."""
    return hashlib.sha256((model / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def earlier_clips(results: Path, settings: dict) -> list[dict]:
    """The clips that an interrupted evaluation with the same settings has judged."""
    if not results.exists():
        return []
    earlier = json.loads(results.read_text())
    different = [name for name, value in settings.items() if earlier.get(name) != value]
    if different:
        raise SystemExit(f"{results} was made with another {', '.join(different)}; give another --output")
    return earlier["clips"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EMBEDDED_FOLDER)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--size", type=int, default=176)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--plan", default="none", help="none, auto or a plan file: judge the accelerated model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.plan != "none":
        from pointillist import accelerate

        accelerate(pipe, args.plan)
    args.output.mkdir(parents=True, exist_ok=True)
    results = args.output / "results.json"
    settings = {"size": args.size, "steps": args.steps, "guidance": args.guidance, "seed": args.seed,
                "plan": args.plan, "weights": weights_digest(args.model)}  # fmt: skip
    clips = earlier_clips(results, settings)
    for number, words in enumerate(split_words()[1][: args.prompts]):
        if number < len(clips):
            continue
        started = time.time()
        frames = generate_clip(pipe, words.caption(), args.size, args.steps, args.guidance, args.seed + number)
        seen = judge(frames)
        clips.append(
            {"prompt": words.caption(), "words": asdict(words), "seen": asdict(seen) if seen else None,
             "seconds": round(time.time() - started, 2)}
        )  # fmt: skip
        summary = {**settings, "clips_judged": len(clips), "right": summarise(clips), "clips": clips}
        if number < SHEET_CLIPS:
            strip = (np.concatenate(list(frames[::8]), axis=1) * 255).round().astype(np.uint8)
            iio.imwrite(args.output / f"strip{number:02d}.png", strip)
        results.write_text(json.dumps(summary, indent=1))
        print(f"{len(clips)}/{args.prompts} {words.caption()}: {'right' if seen == words else seen}", flush=True)
    iio.imwrite(args.output / "contact_sheet.png", contact_sheet(sorted(args.output.glob("strip*.png"))))
    print(json.dumps(summarise(clips)))


if __name__ == "__main__":
    main()
