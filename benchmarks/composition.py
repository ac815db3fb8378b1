"""Sparse attention, step caches, regions and what they are together, on the embedded model.

    python benchmarks/composition.py                     20 steps, 4 prompts, every configuration
    python benchmarks/composition.py --steps 50 --prompts 8 --only NAME …
    python benchmarks/composition.py table               the results as Markdown
    python benchmarks/composition.py picture             the same as a picture for the docs

For each prompt the dense clip and all configurations run in turn in one process; times are seconds of its processor on
one thread, so that other work on the machine does not count. A configuration is a plan, a cache and regions as
`accelerate` takes them. Each measurement is kept at once: an interrupted run goes on.
Results: benchmarks/results/composition_cpu.json.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from embedded import PROMPTS

from pointillist.accel.accelerate import accelerate
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.schedule import Schedule
from pointillist.files import write_whole
from pointillist.hardware import detect
from pointillist.metrics import compare
from pointillist.pipelines.call import defaults
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.video import Clip, write_clips

RESULTS = Path(__file__).parent / "results" / "composition_cpu.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "composition.png"
PARTS = ("text", "denoise", "decode", "write")
"""Of the way from a prompt to a file."""
SEEDS = 200
"""Of the first prompt."""
REGIONS = "change:share=0.3,every=3,predictor=taylor"


@dataclass(frozen=True)
class Configuration:
    """What `accelerate` is given."""

    plan: Any = "none"
    cache: str = "auto"
    regions: str = "auto"

    def digest(self) -> str:
        plan = self.plan.to_json() if isinstance(self.plan, Plan) else self.plan
        return hashlib.sha256(json.dumps([plan, self.cache, self.regions]).encode()).hexdigest()[:8]


def sparse(density: float) -> Plan:
    """One pattern by hand: what sparse attention does by itself."""
    return Plan(
        name=f"pooled {density:g}", table=((Rule("pooled", density),),), tail="pooled", residual=True,
        schedule=Schedule(dense_above=0.95),
    )  # fmt: skip


def configurations(searched: Path) -> dict[str, Configuration]:
    """By name; plans of a search are those in a folder."""
    some = sparse(0.3)
    found: dict[str, Configuration] = {
        "sparse 0.3": Configuration(some),
        "rate 0.05": Configuration(cache="rate:threshold=0.05"),
        "rate 0.1": Configuration(cache="rate:threshold=0.1"),
        "rate 0.1, taylor": Configuration(cache="rate:threshold=0.1,predictor=taylor"),
        "first block 0.15, taylor": Configuration(cache="first_block:threshold=0.15,predictor=taylor"),
        "modulation 0.3": Configuration(cache="modulated:threshold=0.3"),
        "table": Configuration(cache="table"),
        "regions by change": Configuration(regions=REGIONS),
        "regions by change, old keys": Configuration(regions="change:share=0.3,every=3,predictor=last"),
        "regions by change, every second step": Configuration(regions="change:share=0.3,every=2,predictor=taylor"),
        "regions by low std, old keys": Configuration(regions="low_std:share=0.3,every=3,predictor=last"),
        "regions by high std, old keys": Configuration(regions="high_std:share=0.3,every=3,predictor=last"),
        "sparse 0.3 + rate 0.1": Configuration(some, cache="rate:threshold=0.1"),
        "sparse 0.3 + regions": Configuration(some, regions=REGIONS),
        "rate 0.1 + late regions": Configuration(cache="rate:threshold=0.1", regions=f"{REGIONS},from=0.6"),
        "all three": Configuration(some, cache="rate:threshold=0.1", regions=f"{REGIONS},from=0.6"),
    }
    for name in ("quality", "balanced", "fast"):
        path = searched / f"embedded-{name}.safetensors"
        if path.exists():
            plan = Plan.load(path)
            found[f"searched, {name}"] = Configuration(plan)
            alone = Plan.uniform("dense", 1.0)
            schedule = Schedule(computed=plan.schedule.computed, region_after=plan.schedule.region_after)
            if plan.schedule.computed:
                found[f"its reused steps alone, {name}"] = Configuration(
                    replace(
                        alone, name=f"reused steps of {name}", schedule=schedule, cache=plan.cache, regions=plan.regions
                    )
                )
    return found


def measure(names: list[str], steps: int, prompts: int, searched: Path) -> None:
    """Run what is missing of the configurations."""
    known: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())["entries"] if RESULTS.exists() else {}
    chosen = {name: each for name, each in configurations(searched).items() if not names or name in names}
    torch.set_num_threads(1)
    pipe = load_pipeline("embedded")
    pipe.set_progress_bar_config(disable=True)
    for number, prompt in enumerate(PROMPTS[:prompts]):
        missing = {
            name: each
            for name, each in chosen.items()
            if known.get(f"{steps} | {name} | {number}", {}).get("digest") != each.digest()
        }
        dense = (
            generation(pipe, Configuration(cache="none", regions="none"), prompt, SEEDS + number, steps)
            if missing
            else None
        )
        for name, each in missing.items():
            assert dense is not None
            made = generation(pipe, each, prompt, SEEDS + number, steps)
            difference = compare(dense["frames"], made["frames"])
            entry = {
                "digest": each.digest(), "prompt": prompt, "psnr": round(difference.psnr, 3),
                "ssim": round(difference.ssim, 4),
                **{f"{part} speed-up": round(dense[part] / made[part], 3) for part in ("denoise", "total")},
                **{f"{part} share": round(made[part] / made["total"], 4) for part in PARTS},
                **{key: made[key] for key in ("kinds", "held", "notes", "density")},
            }  # fmt: skip
            known[f"{steps} | {name} | {number}"] = entry
            about = {"machine": detect(), "torch": torch.__version__, "threads": torch.get_num_threads()}
            write_whole(RESULTS, (json.dumps({**about, "entries": known}, indent=1) + "\n").encode())
            print(steps, name, number, f"{entry['denoise speed-up']}× {entry['psnr']} dB {entry['kinds']}", flush=True)


def generation(pipe: Any, wish: Configuration, prompt: str, seed: int, steps: int) -> dict[str, Any]:
    """From prompt to file: frames, seconds of each part, and what ran."""
    call = {**defaults(pipe), "num_inference_steps": steps}
    clock = [_seconds()]
    with accelerate(pipe, wish.plan, cache=wish.cache, regions=wish.regions) as handle, torch.no_grad():
        texts = pipe.encode_prompt(prompt, "", True)
        clock.append(_seconds())
        latents = pipe(
            prompt_embeds=texts[0], negative_prompt_embeds=texts[1], **call, output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).frames  # fmt: skip
        report = handle.report()
    clock.append(_seconds())
    frames = _decoded(pipe, latents)
    clock.append(_seconds())
    with tempfile.TemporaryDirectory() as folder:
        write_clips({Path(folder) / "clip.mp4": Clip(frames, {})}, 16)
    clock.append(_seconds())
    text, denoise, decode, write = (after - before for before, after in pairwise(clock))
    return {
        "frames": frames, "text": text, "denoise": denoise, "decode": decode, "write": write,
        "total": clock[-1] - clock[0], "kinds": "".join(kind[0] for kind in report.kinds), "held": report.held,
        "notes": list(report.fallbacks), "density": report.density,
    }  # fmt: skip


def _seconds() -> float:
    """Of processors, so far, in this process and those that it waited for (ffmpeg)."""
    return sum(os.times()[:4])


@torch.no_grad()
def _decoded(pipe: Any, latents: torch.Tensor) -> Any:
    """As the pipeline decodes them: float32 [F, H, W, 3] in [0, 1]."""
    config = pipe.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    video = pipe.vae.decode(latents.to(pipe.vae.dtype) * std + mean, return_dict=False)[0]
    return pipe.video_processor.postprocess_video(video, output_type="np")[0]


def summary() -> list[dict[str, Any]]:
    """A row for each configuration and number of steps, the fastest first."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for key, entry in json.loads(RESULTS.read_text())["entries"].items():
        steps, name, _ = key.split(" | ")
        found.setdefault((int(steps), name), []).append(entry)

    def median(entries: list[dict[str, Any]], name: str) -> float:
        return statistics.median(entry[name] for entry in entries)

    rows = [
        {
            "steps": steps, "name": name, "prompts": len(entries),
            "denoise": median(entries, "denoise speed-up"), "total": median(entries, "total speed-up"),
            "psnr": median(entries, "psnr"), "worst": min(entry["psnr"] for entry in entries),
            "ssim": median(entries, "ssim"), "held": max(sum(entry["held"].values()) for entry in entries) / 2**20,
            "rest": 1 - median(entries, "denoise share"),
        }
        for (steps, name), entries in found.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row["steps"], -row["denoise"]))


def table() -> str:
    """The results as Markdown."""
    lines = [
        "| steps | | prompts | denoising | prompt to file | PSNR, median | worst | SSIM | memory | not denoising |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['steps']} | {row['name']} | {row['prompts']} | {row['denoise']:.2f}× | {row['total']:.2f}× "
        f"| {row['psnr']:.1f} dB | {row['worst']:.1f} dB | {row['ssim']:.3f} | {row['held']:.0f} MiB "
        f"| {row['rest']:.0%} |"
        for row in summary()
    ]
    return "\n".join(lines)


def picture() -> None:
    """Speed-up against PSNR, one point for each configuration at 20 steps."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(9, 5), layout="constrained")
    colours = {"sparse": "#2e86ab", "regions": "#d9a441", "searched": "#d1495b"}
    rows = [row for row in summary() if row["steps"] == 20]
    for number, row in enumerate(rows, 1):
        colour = next((c for word, c in colours.items() if row["name"].startswith(word)), "#20304f")
        panel.scatter(row["denoise"], row["psnr"], color=colour, s=30, label=f"{number}  {row['name']}")
        panel.annotate(
            str(number), (row["denoise"], row["psnr"]), xytext=(4, 3), textcoords="offset points", fontsize=8
        )
    panel.set(xlabel="denoising speed-up, measured", ylabel="PSNR against dense, median (dB)")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False, handletextpad=0)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("measure", "table", "picture"), default="measure")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--only", action="append", default=[], help="these configurations, by their names")
    parser.add_argument("--searched", type=Path, default=Path("outputs"), help="where the plans of a search lie")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args.only, args.steps, args.prompts, args.searched)
    elif args.command == "table":
        print(table())
    else:
        picture()


if __name__ == "__main__":
    main()
