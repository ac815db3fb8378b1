"""The embedded model, dense and accelerated, on eight prompts with fixed seeds.

    python benchmarks/embedded.py [--prompts 8 --size 128 --plan auto]

Each prompt runs dense and accelerated right after each other in one process. Writes the result after every
prompt; figures are medians, with the whole range beside them.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pointillist.hardware import detect
from pointillist.pipelines.generate import GenerateRequest, describe, prepare
from pointillist.pipelines.run import run_once

PROMPTS = (
    "a red circle moving left on black",
    "a green square moving right on gray",
    "a blue triangle moving up on white",
    "a yellow star moving down on navy",
    "a white circle growing on brown",
    "an orange square shrinking on black",
    "a green triangle rotating on white",
    "a red star still on gray",
)
FIGURES = {
    "denoising speed-up": lambda facts: facts["speedup"]["denoise"],
    "attention speed-up": lambda facts: facts["speedup"]["attention"],
    "total speed-up": lambda facts: facts["speedup"]["total"],
    "PSNR (dB)": lambda facts: facts["psnr"],
    "SSIM": lambda facts: facts["ssim"],
    "density": lambda facts: facts["density"],
    "density overall": lambda facts: facts["density_overall"],
    "dense denoising (s)": lambda facts: facts["dense_seconds"]["denoise"],
    "dense attention (s)": lambda facts: facts["dense_seconds"]["attention"],
    "accelerated denoising (s)": lambda facts: facts["seconds"]["denoise"],
    "accelerated attention (s)": lambda facts: facts["seconds"]["attention"],
}


def measure(request: GenerateRequest, seed: int) -> dict[str, Any]:
    """The facts of one prompt."""
    pipe, plan, call = prepare(request)
    dense = run_once(pipe, "none", call, seed, lambda event: None, "dense")
    fast = run_once(pipe, plan, call, seed, lambda event: None, "accelerated")
    return describe(request, call, seed, fast, dense)


def summarise(clips: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of every figure; figures that a dense plan lacks are left out."""
    summary = {}
    for name, figure in FIGURES.items():
        values = [figure(clip) for clip in clips]
        if None not in values:
            summary[name] = {
                "median": round(statistics.median(values), 4),
                "least": round(min(values), 4),
                "greatest": round(max(values), 4),
            }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--size", type=int, help="pixels; by default the model's own size")
    parser.add_argument("--speed")
    parser.add_argument("--plan")
    parser.add_argument("--pattern")
    parser.add_argument("--density", type=float)
    parser.add_argument("--tail", default="default")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = args.output or Path(__file__).parent / "results" / f"embedded_{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    clips = []
    for number, prompt in enumerate(PROMPTS[: args.prompts]):
        request = GenerateRequest(
            prompt, width=args.size, height=args.size, speed=args.speed, plan=args.plan,
            pattern=args.pattern, density=args.density, tail=args.tail, compare=True,
        )  # fmt: skip
        clips.append(measure(request, seed=number))
        result = {
            "machine": detect(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "summary": summarise(clips),
            "clips": clips,
        }
        output.write_text(json.dumps(result, indent=1) + "\n")
        last = clips[-1]
        print(
            f"{number + 1}/{args.prompts} {prompt}: denoising {last['speedup']['denoise']:.2f}×, "
            f"attention {last['speedup']['attention']:.2f}×, {last['psnr']:.1f} dB",
            flush=True,
        )
    table = Table(title=f"{len(clips)} prompts, {clips[0]['tokens']} tokens, {clips[0]['steps']} steps")
    for heading in ("", "median", "least", "greatest"):
        table.add_column(heading, justify="right")
    for name, figure in summarise(clips).items():
        table.add_row(name, *(f"{value:.3f}" for value in figure.values()))
    Console().print(table)
    print(output)


if __name__ == "__main__":
    main()
