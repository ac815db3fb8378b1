"""The searched plan of the embedded model against other ways to choose one, at equal predicted time.

    python benchmarks/search.py --folder outputs/search        the folder of the search that made the plan
    python benchmarks/search.py --folder outputs/search sites  predicted against measured time of the sites of plans
    python benchmarks/search.py --folder outputs/search table  the results as Markdown

Every rival has the same tail, residual, dense steps, prompts and seeds, and spends the same predicted seconds on
attention; speed and quality are then measured, dense and rivals in turn for each prompt. Random search draws as many
plans as the search runs, and keeps the one that is best on the search's own prompt. `--every 0` compares without the
dense steps that the search places among the sparse ones, `--every N` with others.

    single pattern      every pattern, in all heads, at the density that takes the time
    best per layer      one rule for all heads of a layer, chosen as the search chooses
    Sparse-vDiT         argmin of error + λ·(computed share) over its five patterns, λ such that it takes the time
    MInference          of three patterns the one that recalls most mass, in every head, at one density
    random search       rules drawn at random for every head; random blocks is the control of single patterns

Each measurement is kept at once: an interrupted run goes on. Results: benchmarks/results/search_cpu.json.
"""

import argparse
import bisect
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded import PROMPTS

from pointillist.accel.accelerate import accelerate
from pointillist.accel.patterns import PATTERNS
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.schedule import Schedule
from pointillist.files import write_whole
from pointillist.hardware import detect
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.search import machine, prepare_search
from pointillist.search.assign import OverBudget, Problem, assign
from pointillist.search.candidates import NO_CANDIDATES, OPTIONS
from pointillist.search.curve import Choices
from pointillist.search.find import Runs
from pointillist.search.timeline import timeline
from pointillist.search.verify import Clip, against, clip
from pointillist.search.wish import ATTENTION_SPEEDUPS

RESULTS = Path(__file__).parent / "results" / "search_cpu.json"
SITES = RESULTS.with_name("search_sites_cpu.json")
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "search_sites.png"
SEEDS = 100
"""Of the first held-out prompt; the search has used those from 0."""
RANDOM_PLANS = 4
RANDOM_SITES = 2
"""Random plans whose sites are timed, for each speed."""
SITE_STEPS = 6
"""Of the clips in which they are."""
GRID = tuple(blocks / 36 for blocks in range(1, 29))
"""Densities of plans that have one: so many of the 36 key blocks."""
MORE_PROMPTS = (
    "a yellow square moving left on navy", "an orange circle rotating on gray", "a white star moving up on black",
    "a blue triangle shrinking on white", "a red square growing on gray", "a green circle moving down on brown",
    "a yellow star still on black", "a white triangle moving right on navy",
)  # fmt: skip
HELD_OUT = (*PROMPTS, *MORE_PROMPTS)


def rivals(choices: Choices, seconds: float, every: int) -> dict[str, Callable[[], Plan | None]]:
    """Ways to choose a plan whose attention takes `seconds` of a clip; None where one cannot be that fast."""
    singles = {
        " ".join([name, *(f"{key}={value}" for key, value in options.items())]): (name, tuple(sorted(options.items())))
        for name in PATTERNS
        if name not in NO_CANDIDATES
        for options in OPTIONS.get(name, ({},))
    }
    return {
        "searched": lambda: assigned(choices, choices.problem(every=every), seconds, every, "searched"),
        **{
            label: lambda name=name, options=options: single(choices, name, options, seconds, every)
            for label, (name, options) in singles.items()
        },
        "random blocks": lambda: single(choices, "random", (), seconds, every),
        "best per layer": lambda: best_per_layer(choices, seconds, every),
        "Sparse-vDiT": lambda: sparse_vdit(choices, seconds, every),
        "MInference": lambda: minference(choices, seconds, every),
    }


def assigned(choices: Choices, problem: Problem, seconds: float, every: int, name: str) -> Plan | None:
    """What the search's assignment makes of a problem."""
    try:
        chosen = assign(problem, choices.budget(seconds, every))
    except OverBudget:
        return None
    heads = np.broadcast_to(chosen, (len(chosen), choices.study.heads))
    return _plan(choices, heads, every, name)


def _plan(choices: Choices, chosen: np.ndarray, every: int, name: str) -> Plan:
    shape = (len(choices.stages), choices.study.layers, choices.study.heads)
    return choices.plan(choices.of(np.broadcast_to(chosen, shape[1:]).reshape(shape), every=every), name, "here")


def single(choices: Choices, name: str, options: tuple, seconds: float, every: int) -> Plan | None:
    """One rule for all heads of all layers and steps."""
    tables = [((Rule(name, density, options),),) for density in GRID]
    return _densest(choices, tables, seconds, every, name)


def _densest(choices: Choices, tables: list[tuple], seconds: float, every: int, name: str) -> Plan | None:
    """The last of the tables, which get denser, whose attention takes the time."""
    fitting = bisect.bisect_right(tables, seconds, key=lambda table: choices.seconds_of([table], every=every))
    if not fitting:
        return None
    return replace(_plan(choices, np.zeros((1, 1), int), every, name), table=tables[fitting - 1])


def best_per_layer(choices: Choices, seconds: float, every: int) -> Plan | None:
    """All heads of a layer agree, otherwise as the search."""
    problem = choices.problem(every=every)
    tied = replace(
        problem, errors=problem.errors.sum(1, keepdims=True), per_head=problem.per_head * choices.study.heads
    )
    return assigned(choices, tied, seconds, every, "best per layer")


def sparse_vdit(choices: Choices, seconds: float, every: int) -> Plan | None:
    """Sparse-vDiT (AAAI 2026): L = MSE + λ·(1 − S) for full, skip, diagonal, multi-diagonal and stripe; the least L.

    The paper gives no widths: those of density 0.15 are taken. One table for all steps, errors averaged over them.
    """
    menu = [
        Rule("dense", 1.0), Rule("skip", 1.0), Rule("diagonal", 0.15), Rule("diagonal", 0.15, (("order", "hwt"),)),
        Rule("stripe", 0.15, (("by", "anchor"),)),
    ]  # fmt: skip
    numbers = [choices.study.rules.index(rule) for rule in menu]
    steps = timeline(choices.study, every)
    errors = choices.errors("pooled", steps, choices.stages[0])[:, :, numbers]  # [layers, heads, 5]
    kept = np.array([rule.kept for rule in menu])

    def chosen(price: float) -> np.ndarray:
        return np.array(numbers)[(errors + price * kept).argmin(-1)]

    def fits(price: float) -> bool:
        return choices.attention_seconds(choices.of(chosen(price)[None], every=every)) <= seconds

    low, high = 1e-9, 1e3
    if not fits(high):
        return None
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return _plan(choices, chosen(high), every, "Sparse-vDiT")


def minference(choices: Choices, seconds: float, every: int) -> Plan | None:
    """MInference: A-shape, vertical-slash or block-sparse, whichever keeps most softmax mass in a head, all at one
    density. Masses are those of the pooled maps that the search recorded."""
    menu = ("a_shape", "vertical_slash", "pooled")
    kept, maps = choices.profile.kept.numpy() / 255, choices.profile.maps.numpy()
    recall = np.stack(
        [(kept[:, choices.study.rules.index(Rule(name, 0.15))] * maps).sum((-2, -1)) / maps.shape[-1] for name in menu],
        -1,
    )  # [layers, heads, 3]
    best = recall.argmax(-1).tolist()
    tables = [tuple(tuple(Rule(menu[i], density) for i in row) for row in best) for density in GRID]
    return _densest(choices, tables, seconds, every, "MInference")


def random_plans(choices: Choices, seconds: float, every: int, generator: np.random.Generator) -> list[Plan]:
    """What the assignment makes of errors that are drawn at random: any rules that take the time."""
    problem = choices.problem(every=every)
    drawn = (generator.random(problem.errors.shape) for _ in range(RANDOM_PLANS))
    plans = (assigned(choices, replace(problem, errors=each), seconds, every, "random search") for each in drawn)
    return [plan for plan in plans if plan is not None]


class Results:
    """A JSON file of measurements by key, written after every one."""

    def __init__(self) -> None:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self.entries: dict[str, dict[str, Any]] = known.get("entries", {})

    def add(self, key: str, entry: dict[str, Any]) -> None:
        self.entries[key] = entry
        about = {"machine": detect(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        text = json.dumps({**about, "entries": self.entries}, indent=1) + "\n"
        write_whole(RESULTS, text.encode())
        print(key, entry, flush=True)


def _choices(folder: Path) -> tuple[Any, Choices]:
    """The search in a folder, measured if it is not, and what it offers on this machine."""
    pipe = load_pipeline("embedded")
    search, held_out = prepare_search(pipe, folder, None, None, lambda *told: None)
    hardware, _ = machine("auto", search.study.dtype, pipe.device, lambda *told: None)
    search.measure()
    return search, search.choices(hardware, Runs(search, held_out))


def measure(
    folder: Path, speed: str, target: float | None, every: int | None, prompts: int, labels: list[str], threads: int
) -> None:
    """Run the plans on held-out prompts, with seeds that the search did not use."""
    search, choices = _choices(folder)
    seconds = choices.dense.attention / (target or ATTENTION_SPEEDUPS[speed])
    speed = f"predicted {target:g}×" if target else speed
    name = speed if every is None else f"{speed}, dense every {every}"
    every = choices.at_attention(seconds).every if every is None else every
    made = {label: make() for label, make in rivals(choices, seconds, every).items() if not labels or label in labels}
    plans = {label: plan for label, plan in made.items() if plan is not None}
    best = _best_random(search, choices, seconds, every) if not labels or "random search" in labels else None
    if best is not None:
        plans["random search"] = best
    print("cannot be that fast:", ", ".join(label for label, plan in made.items() if plan is None) or "none")
    results = Results()
    torch.set_num_threads(threads or torch.get_num_threads())
    for number, prompt in enumerate(HELD_OUT[:prompts]):
        digests = {label: hashlib.sha256(plan.to_json().encode()).hexdigest()[:8] for label, plan in plans.items()}
        known = {label: results.entries.get(f"{name} | {label} | {number}", {}).get("plan") for label in plans}
        missing = [label for label in plans if known[label] != digests[label]]
        if missing:
            dense = _clip(search, "none", prompt, SEEDS + number)
        for label in missing:
            measured = against(dense, _clip(search, plans[label], prompt, SEEDS + number))
            results.add(f"{name} | {label} | {number}", {
                "prompt": prompt, "plan": digests[label],
                "psnr": round(measured.psnr, 3), "ssim": round(measured.ssim, 4),
                "attention": round(measured.attention_speedup, 3), "denoising": round(measured.speedup, 3),
                "density": round(measured.density, 3), "fallbacks": list(measured.fallbacks),
            })  # fmt: skip


def measure_sites(folder: Path) -> None:
    """Time every site's calls in clips of few steps, with the three searched plans and some random ones."""
    search, choices = _choices(folder)
    rows, dense = [], []
    for speed, speedup in ATTENTION_SPEEDUPS.items():
        seconds = choices.dense.attention / speedup
        every = choices.at_attention(seconds).every
        plans = {"searched": rivals(choices, seconds, every)["searched"]()}
        drawn = random_plans(choices, seconds, every, np.random.default_rng(1))[:RANDOM_SITES]
        plans |= {f"random {number}": plan for number, plan in enumerate(drawn, 1)}
        for label, plan in plans.items():
            if plan is None:
                continue
            times = _site_times(search, plan)
            dense += times["dense"]
            for layer, measured in enumerate(times["sparse"]):
                predicted = choices.site_seconds(list(plan.table[layer]))
                rows.append({
                    "speed": speed, "plan": label, "layer": layer, "rules": len(set(plan.table[layer])),
                    "milliseconds": round(measured * 1e3, 3), "predicted_ms": round(predicted * 1e3, 3),
                })  # fmt: skip
            print(speed, label, flush=True)
    rows = [row for row in rows if row["milliseconds"] > 0]
    # the machine is shared: predictions are of its speed when it was calibrated, so both are divided by a dense call
    ratio = statistics.median(dense) / choices.dense_call
    errors = [row["predicted_ms"] * ratio / row["milliseconds"] - 1 for row in rows]
    result = {
        "machine": detect(), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "dense_ms": round(statistics.median(dense) * 1e3, 3), "dense_predicted_ms": round(choices.dense_call * 1e3, 3),
        "mean_error": round(statistics.mean(map(abs, errors)), 4), "largest_error": round(max(map(abs, errors)), 4),
        "rows": rows,
    }  # fmt: skip
    SITES.write_text(json.dumps(result, indent=1) + "\n")
    _scatter(result, ratio)
    print(f"{len(rows)} sites, mean error {result['mean_error']:.1%}, largest {result['largest_error']:.0%}")


def _site_times(search: Any, plan: Plan) -> dict[str, list[float]]:
    """Seconds of the calls of a clip of few steps: dense ones that nothing learns from, and the median of the sparse
    ones of each layer, 0 where all were dense."""
    call = {**search.study.call, "num_inference_steps": SITE_STEPS}
    with accelerate(search.pipe, replace(plan, schedule=Schedule(dense_steps=2))) as handle:
        generator = torch.Generator().manual_seed(0)
        search.pipe(prompt=HELD_OUT[0], **call, generator=generator, output_type="latent")
        calls = handle._runtime.record.calls
    sparse: list[list[float]] = [[] for _ in range(search.study.layers)]
    for each in calls:
        if each.density is not None:
            sparse[int(each.site.split(".")[-2])].append(each.end - each.start)
    dense = [each.end - each.start for each in calls if each.step == 0]
    return {"dense": dense, "sparse": [statistics.median(each) if each else 0.0 for each in sparse]}


def _scatter(result: dict[str, Any], ratio: float) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5.8, 5.4), layout="constrained")
    rows = result["rows"]
    limits = [0.8 * min(row["milliseconds"] for row in rows), 1.2 * max(row["milliseconds"] for row in rows)]
    panel.fill_between(limits, [0.9 * x for x in limits], [1.1 * x for x in limits], color="0.9", label="±10 %")
    panel.plot(limits, limits, color="0.5", linewidth=0.8)
    for kind in ("searched", "random"):
        mine = [row for row in rows if row["plan"].startswith(kind)]
        panel.scatter(
            [row["milliseconds"] for row in mine], [row["predicted_ms"] * ratio for row in mine], s=18, label=kind
        )
    panel.set_title(
        f"sites of plans: mean error {result['mean_error']:.1%}, largest {result['largest_error']:.0%}", fontsize=10
    )
    panel.set(xlim=limits, ylim=limits, xlabel="measured, ms (median of a clip)", ylabel="predicted, ms")
    panel.legend(fontsize=8, frameon=False)
    figure.savefig(PICTURE, dpi=110)


def _best_random(search: Any, choices: Choices, seconds: float, every: int) -> Plan | None:
    """The one of some random plans that is best on the first calibration prompt; None if none is that fast."""
    prompt, seed = search.study.prompts[0], 1000
    dense = _clip(search, "none", prompt, seed)
    each = random_plans(choices, seconds, every, np.random.default_rng(0))
    return max(each, key=lambda plan: against(dense, _clip(search, plan, prompt, seed)).psnr, default=None)


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
    parser.add_argument("command", nargs="?", choices=("measure", "sites", "table"), default="measure")
    parser.add_argument("--folder", type=Path, default=Path("outputs/search"))
    parser.add_argument("--speed", choices=tuple(ATTENTION_SPEEDUPS), default="balanced")
    parser.add_argument("--target", type=float, help="a speed-up of attention, as predicted, in place of a speed")
    parser.add_argument("--every", type=int, help="dense steps among the sparse ones, in place of the search's own")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--only", action="append", default=[], help="these rivals, by their labels")
    parser.add_argument("--threads", type=int, default=0, help="of the clips; plans are chosen for all of the machine")
    args = parser.parse_args()
    if args.command == "table":
        print(table())
    elif args.command == "sites":
        measure_sites(args.folder)
    else:
        measure(args.folder, args.speed, args.target, args.every, args.prompts, args.only, args.threads)


if __name__ == "__main__":
    main()
