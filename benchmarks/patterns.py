"""Every pattern on the embedded model: errors on recorded q, k, v, and clips against dense ones.

    python benchmarks/patterns.py record     q, k, v of one dense run, once
    python benchmarks/patterns.py sites      relative error, selection share and speed-up, per pattern, density, tail
    python benchmarks/patterns.py clips      PSNR and SSIM of two prompts, then of eight for the best six
    python benchmarks/patterns.py table      the results as Markdown

Each command goes on where it stopped: what is in the results is not measured again, and each dense clip is made once
and kept. Recordings and dense clips go to outputs/patterns/, results to benchmarks/results/patterns_*.json.
"""

import argparse
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded import PROMPTS
from safetensors import safe_open
from safetensors.torch import save_file

from pointillist.accel.accelerate import accelerate
from pointillist.accel.layouts import Group, lay_out, pattern_for, select, sub_call
from pointillist.accel.patterns import PATTERNS
from pointillist.accel.patterns.pattern import Call
from pointillist.accel.plan import Plan
from pointillist.accel.tails import attend, remember_kept_mass, remember_loss
from pointillist.accel.tiles import whole_video
from pointillist.hardware import detect
from pointillist.metrics import compare
from pointillist.pipelines.generate import GenerateRequest, prepare

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parent.parent / "outputs" / "patterns"
DENSE_STEPS = 3
"""Of 20; the last of them is what calibrating patterns see."""
STEPS = 20
RECORDED_STEPS = (DENSE_STEPS - 1, 3, 8, 15)
DENSITIES = (0.5, 0.3, 0.2, 0.1)
CLIP_DENSITIES = (0.3, 0.1)
BLOCK = 128
BEST = 6

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "pooled": (
        {"order": "tiles"}, {"order": "gilbert"}, {"order": "thw"}, {"rule": "mass"}, {"rule": "hybrid"},
        {"rule": "head"}, {"rule": "above"}, {"similarity": 0.3},
    ),
    "sampled": ({"channels": 16},),
    "neighborhood": ({"shape": "circle"}, {"dilation": 2}),
    "diagonal": ({"order": "hwt"},),
    "tile": ({"rotate": True},),
    "semantic": ({"routing": "error"}, {"balanced": True}),
    "stripe": ({"by": "anchor"},),
    "masses": ({"head_budget": True},),
    "grid": ({"spread": True},),
}  # fmt: skip
"""Options worth a row of their own, beside each pattern's defaults."""
OTHER_TAILS = ("rectified", "rescaled", "pooled + residual")
TAILS_SHOWN = ("random", "window", "pooled", "pyramid", "semantic (routing=error)")
"""Variants that are measured with every tail."""
RESIDUAL, UNTAILED = " + residual", " without tail"
"""Behind a label: the plan with its residual; the plan without its tail."""
UNMEASURED = ("dense", "skip")
"""Patterns that have no density."""


def variants() -> list[tuple[str, str, dict[str, Any]]]:
    """(label, pattern, options)."""
    found = []
    for name in PATTERNS:
        for options in ({}, *OPTIONS.get(name, ())):
            words = ", ".join(f"{key}={value}" for key, value in options.items())
            found.append((f"{name} ({words})" if words else name, name, options))
    return [each for each in found if each[1] not in UNMEASURED]


class Results:
    """A JSON file of entries by key, written after every one."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.entries: dict[str, Any] = known.get("entries", {})

    def add(self, key: str, entry: Any) -> None:
        self.entries[key] = entry
        about = {"machine": detect(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**about, "entries": self.entries}, indent=1) + "\n")
        temporary.replace(self.path)


def record(prompt: str = PROMPTS[0], seed: int = 0) -> None:
    """Keep q, k and v of every site at a few steps of one dense run, of the pass with the prompt."""
    path = KEPT / "recorded.safetensors"
    if path.exists():
        return
    kept: dict[str, torch.Tensor] = {}

    def keep(site: str, branch: str, step: int | None, q: Any, k: Any, v: Any, out: Any) -> None:
        if branch == "cond" and step in RECORDED_STEPS:
            for name, x in (("q", q), ("k", k), ("v", v)):
                kept[f"{site}/{step}/{name}"] = x.detach().transpose(1, 2).contiguous().clone()

    pipe, _, call = prepare(GenerateRequest(prompt, plan="none"))
    with accelerate(pipe, "none") as handle:
        handle.observe(keep)
        pipe(**call, generator=torch.Generator().manual_seed(seed), output_type="latent")
        grid = handle._runtime.record.grid
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, path, metadata={"grid": json.dumps(grid), "prompt": prompt})


def recorded() -> Iterator[list[Call]]:
    """The calls of each site, in the order of the steps; the first is the last dense step."""
    with safe_open(KEPT / "recorded.safetensors", framework="pt") as file:
        grid = tuple(json.loads(file.metadata()["grid"]))
        sites = sorted({key.split("/")[0] for key in file.keys()}, key=lambda site: int(site.split(".")[-2]))
        for layer, site in enumerate(sites):
            calls = []
            for step in RECORDED_STEPS:
                q, k, v = (file.get_tensor(f"{site}/{step}/{name}") for name in "qkv")
                call = Call(q, k, v, q.shape[-1] ** -0.5, grid, whole_video(grid), BLOCK)
                calls.append(replace(call, layer=layer, step=step, steps=STEPS))
            yield calls


@torch.inference_mode()
def measure_sites(densities: tuple[float, ...]) -> None:
    """Relative error of the output, selection share and speed-up of every variant, density and tail."""
    record()
    results = Results("patterns_sites")
    sites = list(recorded())
    dense = [[_dense(call) for call in calls] for calls in sites]
    for density in densities:
        for label, name, options in variants():
            for tail in ("none", "pooled", *(OTHER_TAILS if label in TAILS_SHOWN else ())):
                key = f"{label} | {density:g} | {tail}"
                if key not in results.entries:
                    results.add(key, _measured(name, density, options, tail, sites, dense))
                    print(key, results.entries[key], flush=True)


def _measured(
    name: str,
    density: float,
    options: dict[str, Any],
    tail: str,
    sites: list[list[Call]],
    dense: list[list[torch.Tensor]],
) -> dict[str, Any]:
    grid, segments = sites[0][0].grid, sites[0][0].segments
    pattern = pattern_for(name, density, tuple(sorted(options.items())), grid, segments, BLOCK)
    group = Group(pattern)
    errors, realised, shares, speedups, notes = [], [], [], [], Counter[str]()
    for calls, outputs in zip(sites, dense, strict=True):
        memory: dict[Any, Any] = {}
        first = replace(calls[0], memory=memory, notes=notes)
        pattern.prepare(sub_call(group, first), outputs[0])
        laid = lay_out([(group, select(group, first))], first)
        if tail == "rescaled":
            remember_kept_mass(first, laid, outputs[0])
        if tail.endswith(RESIDUAL):
            remember_loss(first, laid, outputs[0], tail.removesuffix(RESIDUAL))
        for call, expected in zip(calls[1:], outputs[1:], strict=True):
            call = replace(call, memory=memory, notes=notes)
            moments = [time.perf_counter()]
            _dense(call)
            moments.append(time.perf_counter())
            laid = lay_out([(group, select(group, call))], call)
            moments.append(time.perf_counter())
            out = pattern.finish(sub_call(group, call), attend(call, laid, tail.removesuffix(RESIDUAL)))
            moments.append(time.perf_counter())
            in_dense, selecting, attending = (b - a for a, b in itertools.pairwise(moments))
            errors.append(float((out - expected).norm() / expected.norm()))
            realised.append(float(laid.density))
            shares.append(selecting / (selecting + attending))
            speedups.append(in_dense / (selecting + attending))
    return {
        "density": round(statistics.mean(realised), 4),
        "error": round(statistics.mean(errors), 4),
        "worst_error": round(max(errors), 4),
        "selection_share": round(statistics.median(shares), 4),
        "speedup": round(statistics.median(speedups), 3),
        **({"notes": sorted(notes)} if notes else {}),
    }


def _dense(call: Call) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)


def measure_clips(prompts: int, densities: tuple[float, ...], labels: list[str]) -> None:
    """PSNR and SSIM against the dense clip of the same prompt and seed, of variants by their labels."""
    results = Results("patterns_clips")
    known = {label: (name, options) for label, name, options in variants()}
    for number in range(prompts):
        for density in densities:
            for label in labels:
                key = f"{label} | {density:g} | {number}"
                if key in results.entries:
                    continue
                name, options = known[label.removesuffix(RESIDUAL).removesuffix(UNTAILED)]
                plan = Plan.uniform(name, density, dense_steps=DENSE_STEPS, block=BLOCK, **options)
                plan = replace(plan, residual=label.endswith(RESIDUAL), tail="none" if UNTAILED in label else plan.tail)
                results.add(key, _clip(plan, number))
                print(key, results.entries[key], flush=True)


def _clip(plan: Plan, number: int) -> dict[str, Any]:
    expected = _dense_clip(number)
    frames, report = _run(plan, number)
    difference = compare(expected, frames)
    return {
        "prompt": PROMPTS[number],
        "psnr": round(difference.psnr, 3),
        "ssim": round(difference.ssim, 4),
        "density": round(report.density, 4),
        "tail": plan.tail,
        **({"notes": report.fallbacks} if report.fallbacks else {}),
    }


def _dense_clip(number: int) -> np.ndarray:
    path = KEPT / f"dense_{number}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".tmp").open("wb") as file:
            np.save(file, _run("none", number)[0])
        path.with_suffix(".tmp").replace(path)
    return np.load(path)


def _run(plan: Plan | str, number: int) -> tuple[np.ndarray, Any]:
    pipe, _, call = prepare(GenerateRequest(PROMPTS[number], plan="none"))
    with accelerate(pipe, plan) as handle:
        frames = pipe(**call, generator=torch.Generator().manual_seed(number), output_type="np").frames[0]
    return frames, handle.report()


def best_patterns(count: int) -> list[str]:
    """Those with the highest median PSNR at the first density, on the first two prompts."""
    found: dict[str, list[float]] = {}
    for key, entry in Results("patterns_clips").entries.items():
        label, density, number = key.split(" | ")
        if label in PATTERNS and float(density) == CLIP_DENSITIES[0] and int(number) < 2:
            found.setdefault(label, []).append(entry["psnr"])
    return sorted(found, key=lambda label: -statistics.median(found[label]))[:count]


def tables() -> str:
    """The results as Markdown: one table for sites, by wished density, one for clips."""
    sites, clips = Results("patterns_sites").entries, Results("patterns_clips").entries
    lines = [
        "| pattern | density | error, no tail | pooled tail | worst site | choosing | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    of_sites: dict[str, dict[str, Any]] = {}
    for key, entry in sites.items():
        label, density, tail = key.split(" | ")
        of_sites.setdefault(f"{density} {label}", {})[tail] = entry
    complete = {key: each for key, each in of_sites.items() if {"none", "pooled"} <= set(each)}
    for key in sorted(complete, key=lambda key: (-float(key.split(" ")[0]), complete[key]["pooled"]["error"])):
        none, pooled = complete[key]["none"], complete[key]["pooled"]
        lines.append(
            f"| {key.partition(' ')[2]} | {pooled['density']:.2f} | {none['error']:.3f} | {pooled['error']:.3f} "
            f"| {pooled['worst_error']:.3f} | {pooled['selection_share']:.0%} | {pooled['speedup']:.2f}× |"
        )
    lines += [
        "",
        "| pattern | density | prompts | PSNR, median | PSNR, worst | SSIM, median |",
        "|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, entry in clips.items():
        label, density, _ = key.split(" | ")
        found.setdefault((label, density), []).append(entry)
    for (label, density), entries in sorted(
        found.items(), key=lambda item: (-float(item[0][1]), -statistics.median(clip["psnr"] for clip in item[1]))
    ):
        psnr, ssim = ([clip[name] for clip in entries] for name in ("psnr", "ssim"))
        lines.append(
            f"| {label} | {density} | {len(entries)} | {statistics.median(psnr):.1f} dB | {min(psnr):.1f} dB "
            f"| {statistics.median(ssim):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "sites", "clips", "table"))
    parser.add_argument("--only", action="append", help="clips: these variants, by their labels")
    parser.add_argument("--prompts", type=int, help="clips: so many, instead of 2 and then 8 for the best six")
    parser.add_argument("--density", type=float, action="append", help="these, instead of all")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if args.command == "record":
        record()
    elif args.command == "sites":
        measure_sites(args.density or DENSITIES)
    elif args.command == "clips":
        plain = [name for name in PATTERNS if name not in UNMEASURED]
        measure_clips(args.prompts or 2, args.density or CLIP_DENSITIES, args.only or plain)
        if not (args.only or args.prompts or args.density):
            measure_clips(len(PROMPTS), CLIP_DENSITIES, best_patterns(BEST))
    else:
        print(tables())


if __name__ == "__main__":
    main()
