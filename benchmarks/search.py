"""The searched plan of the embedded model against other ways to choose one, at equal predicted time.

    python benchmarks/search.py --folder outputs/search        the folder of the search that made the plan
    python benchmarks/search.py --folder outputs/search table  the results as Markdown

Every rival has the same tail, residual, dense steps, prompts and seeds, and spends the same predicted seconds on
attention; speed and quality are then measured, dense and rivals in turn for each prompt. Random search draws as many
plans as the search runs, and keeps the one that is best on the search's own prompt.

    single pattern      every pattern, in all heads, at the density that takes the time
    best per layer      one rule for all heads of a layer, chosen as the search chooses
    Sparse-vDiT         argmin of error + λ·(computed share) over its five patterns, λ such that it takes the time
    MInference          of three patterns the one that recalls most mass, in every head, at one density
    random              rules drawn at random for every head

Each measurement is kept at once: an interrupted run goes on. Results: benchmarks/results/search_cpu.json.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded import PROMPTS

from pointillist.accel.patterns import PATTERNS
from pointillist.accel.plan import Plan, Rule
from pointillist.hardware import detect
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.search import machine, prepare_search
from pointillist.search.assign import OverBudget, Problem, assign
from pointillist.search.candidates import NO_CANDIDATES, OPTIONS
from pointillist.search.curve import Choices
from pointillist.search.find import Runs
from pointillist.search.verify import Clip, against, clip
from pointillist.search.wish import ATTENTION_SPEEDUPS

RESULTS = Path(__file__).parent / "results" / "search_cpu.json"
RANDOM_PLANS = 4
MORE_PROMPTS = (
    "a yellow square moving left on navy", "an orange circle rotating on gray", "a white star moving up on black",
    "a blue triangle shrinking on white", "a red square growing on gray", "a green circle moving down on brown",
    "a yellow star still on black", "a white triangle moving right on navy",
)  # fmt: skip
HELD_OUT = (*PROMPTS, *MORE_PROMPTS)


def rivals(choices: Choices, seconds: float) -> dict[str, Callable[[], Plan | None]]:
    """Ways to choose a plan whose attention takes `seconds` of a clip; None where one cannot be that fast."""
    singles = {
        " ".join([name, *(f"{key}={value}" for key, value in options.items())]): (name, tuple(sorted(options.items())))
        for name in PATTERNS
        if name not in NO_CANDIDATES
        for options in OPTIONS.get(name, ({},))
    }
    return {
        "searched": lambda: choices.plan(choices.at_attention(seconds), "searched", "here"),
        **{
            label: lambda name=name, options=options: single(choices, name, options, seconds)
            for label, (name, options) in singles.items()
        },
        "random blocks": lambda: single(choices, "random", (), seconds),
        "best per layer": lambda: best_per_layer(choices, seconds),
        "Sparse-vDiT": lambda: sparse_vdit(choices, seconds),
        "MInference": lambda: minference(choices, seconds),
    }


def single(choices: Choices, name: str, options: tuple, seconds: float) -> Plan | None:
    """One rule for all heads of all layers and steps."""
    return _uniform(choices, seconds, lambda density: [Rule(name, density, options)])


def _uniform(choices: Choices, seconds: float, rules: Callable[[float], list[Rule]]) -> Plan | None:
    """The greatest density at which sites with these rules take the time; found on a grid of whole key blocks."""
    budget = _per_step(choices, seconds) / choices.study.layers
    grid = [share / 36 for share in range(1, 29)]
    fitting = [density for density in grid if choices.site_seconds(rules(density)) <= budget]
    if not fitting:
        return None
    best = choices.at_attention(seconds)
    plan = choices.plan(best, "single", "here")
    return replace(plan, table=((*rules(max(fitting)),),), stages=())


def best_per_layer(choices: Choices, seconds: float) -> Plan | None:
    """All heads of a layer agree, otherwise as the search."""
    problem, heads = choices.problem(), choices.study.heads
    tied = Problem(
        problem.errors.sum(1, keepdims=True), problem.per_head * heads, problem.fixed, problem.sparse, problem.dense
    )
    try:
        chosen = assign(tied, choices.budget(seconds))
    except OverBudget:
        return None
    shape = (*choices.weights.shape, heads)
    return choices.plan(choices.of(np.repeat(chosen, heads, 1).reshape(shape)), "best per layer", "here")


def sparse_vdit(choices: Choices, seconds: float) -> Plan | None:
    """Sparse-vDiT (AAAI 2026): L = MSE + λ·(1 − S) for full, skip, diagonal, multi-diagonal and stripe; the least L.

    The paper gives no widths: those of density 0.15 are taken. One table for all steps, errors averaged over them.
    """
    menu = [
        Rule("dense", 1.0), Rule("skip", 1.0), Rule("diagonal", 0.15), Rule("diagonal", 0.15, (("order", "hwt"),)),
        Rule("stripe", 0.15, (("by", "anchor"),)),
    ]  # fmt: skip
    numbers = [choices.study.rules.index(rule) for rule in menu]
    errors = choices.errors("pooled", True).mean(0)[:, :, numbers]  # [layers, heads, 5]
    kept = np.array([rule.kept for rule in menu])

    def chosen(price: float) -> np.ndarray:
        picked = np.array(numbers)[(errors + price * kept).argmin(-1)]
        return np.broadcast_to(picked, (len(choices.weights), *picked.shape))

    return _bisected(choices, seconds, chosen, "Sparse-vDiT")


def _bisected(choices: Choices, seconds: float, chosen: Callable[[float], np.ndarray], name: str) -> Plan | None:
    """The choice at the lowest price that takes the time."""
    low, high = 1e-9, 1e3
    if choices.attention_seconds(choices.of(chosen(high))) > seconds:
        return None
    for _ in range(40):
        middle = (low * high) ** 0.5
        fits = choices.attention_seconds(choices.of(chosen(middle))) <= seconds
        low, high = (low, middle) if fits else (middle, high)
    return choices.plan(choices.of(chosen(high)), name, "here")


def minference(choices: Choices, seconds: float) -> Plan | None:
    """MInference: A-shape, vertical-slash or block-sparse, whichever keeps most softmax mass in a head, all at one
    density. Masses are those of the pooled maps that the search recorded."""
    menu = ("a_shape", "vertical_slash", "pooled")
    kept, maps = choices.profile.kept.numpy() / 255, choices.profile.maps.numpy()
    recall = np.stack(
        [(kept[:, choices.study.rules.index(Rule(name, 0.15))] * maps).sum((-2, -1)) / maps.shape[-1] for name in menu],
        -1,
    )  # [layers, heads, 3]
    best = recall.argmax(-1)
    budget, grid = _per_step(choices, seconds), [share / 36 for share in range(1, 29)]
    tables = [tuple(tuple(Rule(menu[i], density) for i in row) for row in best.tolist()) for density in grid]
    fitting = [table for table in tables if sum(choices.site_seconds(list(row)) for row in table) <= budget]
    if not fitting:
        return None
    return replace(choices.plan(choices.at_attention(seconds), "MInference", "here"), table=fitting[-1], stages=())


def random_plans(choices: Choices, seconds: float, generator: np.random.Generator) -> list[Plan]:
    """Rules drawn at random for every head of every layer, the same in all steps, until they take the time."""
    found: list[Plan] = []
    shape = (choices.study.layers, choices.study.heads)
    while len(found) < RANDOM_PLANS:
        picked = generator.integers(0, len(choices.study.rules), shape)
        choice = choices.of(np.broadcast_to(picked, (len(choices.weights), *shape)))
        if 0.93 * seconds <= choices.attention_seconds(choice) <= seconds:
            found.append(choices.plan(choice, "random search", "here"))
    return found


def _per_step(choices: Choices, seconds: float) -> float:
    """Predicted seconds for one call of every layer, if attention takes `seconds` of a clip."""
    steps = choices.study.steps - choices.study.dense_steps
    return choices.budget(seconds) / (steps * choices.profile.branches)


class Results:
    """A JSON file of measurements by key, written after every one."""

    def __init__(self) -> None:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self.entries: dict[str, dict[str, Any]] = known.get("entries", {})

    def add(self, key: str, entry: dict[str, Any]) -> None:
        self.entries[key] = entry
        about = {"machine": detect(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        beside = RESULTS.with_suffix(".tmp")
        beside.write_text(json.dumps({**about, "entries": self.entries}, indent=1) + "\n")
        beside.replace(RESULTS)
        print(key, entry, flush=True)


def measure(folder: Path, speed: str, prompts: int, labels: list[str]) -> None:
    """Run the plans on held-out prompts, with seeds that the search did not use."""
    pipe = load_pipeline("embedded")
    search, _ = prepare_search(pipe, folder, None, None, lambda *told: None)
    hardware, _ = machine("auto", search.study.dtype, pipe.device, lambda *told: None)
    search.measure()
    choices = search.choices(hardware, Runs(search, (HELD_OUT[0],)))
    seconds = choices.dense.attention / ATTENTION_SPEEDUPS[speed]
    made = {label: make() for label, make in rivals(choices, seconds).items() if not labels or label in labels}
    plans = {label: plan for label, plan in made.items() if plan is not None}
    print("cannot be that fast:", ", ".join(label for label, plan in made.items() if plan is None) or "none")
    if not labels or "random search" in labels:
        plans["random search"] = _best_random(search, choices, seconds)
    results = Results()
    for number, prompt in enumerate(HELD_OUT[:prompts]):
        missing = [label for label in plans if f"{speed} | {label} | {number}" not in results.entries]
        if missing:
            dense = _clip(search, "none", prompt, number)
        for label in missing:
            measured = against(dense, _clip(search, plans[label], prompt, number))
            results.add(f"{speed} | {label} | {number}", {
                "prompt": prompt, "psnr": round(measured.psnr, 3), "ssim": round(measured.ssim, 4),
                "attention": round(measured.attention_speedup, 3), "denoising": round(measured.speedup, 3),
                "density": round(measured.density, 3), "fallbacks": list(measured.fallbacks),
            })  # fmt: skip


def _best_random(search: Any, choices: Choices, seconds: float) -> Plan:
    """The one of some random plans that is best on the first calibration prompt."""
    prompt, seed = search.study.prompts[0], 1000
    dense = _clip(search, "none", prompt, seed)
    each = random_plans(choices, seconds, np.random.default_rng(0))
    return max(each, key=lambda plan: against(dense, _clip(search, plan, prompt, seed)).psnr)


def _clip(search: Any, plan: Plan | str, prompt: str, seed: int) -> Clip:
    return clip(search.pipe, search.study, plan, prompt, lambda step: None, seed)


def table() -> str:
    """The results as Markdown, the best first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, entry in Results().entries.items():
        speed, label, _ = key.split(" | ")
        found.setdefault((speed, label), []).append(entry)

    def median(entries: list[dict[str, Any]], name: str) -> float:
        return statistics.median(entry[name] for entry in entries)

    lines = [
        "| speed | plan | prompts | PSNR, median | worst | SSIM | attention | denoising | density |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (speed, label), entries in sorted(found.items(), key=lambda item: (item[0][0], -median(item[1], "psnr"))):
        lines.append(
            f"| {speed} | {label} | {len(entries)} | {median(entries, 'psnr'):.1f} dB "
            f"| {min(entry['psnr'] for entry in entries):.1f} dB | {median(entries, 'ssim'):.3f} "
            f"| {median(entries, 'attention'):.2f}× | {median(entries, 'denoising'):.2f}× "
            f"| {median(entries, 'density'):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("measure", "table"), default="measure")
    parser.add_argument("--folder", type=Path, default=Path("outputs/search"))
    parser.add_argument("--speed", choices=tuple(ATTENTION_SPEEDUPS), default="balanced")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--only", action="append", default=[], help="these rivals, by their labels")
    args = parser.parse_args()
    if args.command == "table":
        print(table())
    else:
        measure(args.folder, args.speed, args.prompts, args.only)


if __name__ == "__main__":
    main()
