"""Predicted against measured time of a site's attention call, for every pattern, density and tail.

    python benchmarks/cost_model.py measure [--profile FILE.json]    adds the shapes that are not measured yet
    python benchmarks/cost_model.py plot                             docs/images/cost_model.png, and the table

Calls run on random q, k and v, in turn within each of five rounds. Others may work on the machine: the fastest round
counts, as in calibration; errors against medians are given beside it, and what was clearly disturbed (a dense call
slower than elsewhere by a tenth) is measured again by the next `measure`. `--profile` is what `pointillist
bench attention --calibrate` wrote on this machine (default outputs/cost_model/profile.json); the other predictions are
those of the data sheet's profile. None of the shapes is one that calibration measures.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pointillist.accel.patterns import PATTERNS
from pointillist.accel.plan import Rule
from pointillist.hardware import detect
from pointillist.hardware.profile import load_profile
from pointillist.search.calibrate import measure
from pointillist.search.cost_model import CostModel
from pointillist.search.site_call import SiteShape

RESULTS = Path(__file__).parent / "results" / "cost_model_cpu.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "cost_model.png"
PROFILE = Path(__file__).parent.parent / "outputs" / "cost_model" / "profile.json"
DATA_SHEET = "epyc-genoa-2c"
SHAPES = (SiteShape((9, 22, 22), 1, 4, 64), SiteShape((5, 16, 24), 1, 4, 64), SiteShape((6, 20, 28), 1, 2, 128))
"""The embedded model's, a shorter one, and one of other heads."""
DENSITIES = (0.5, 0.3, 0.2, 0.1)
DISTURBED = 1.1
WITHOUT_DENSITY = ("dense", "skip")
MIXED = ("window", "pooled", "semantic", "reorder")
"""A site whose heads all differ."""
SHOWN = ("dense", "window", "pooled", "semantic", "vertical_slash", "pyramid", "mixed")


def run(profile: str) -> None:
    """Measure what the results lack, and predict all of it anew."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    rows = undisturbed(known["rows"])
    done = {(tuple(row["grid"]), row["asked"]) for row in rows}
    for shape in SHAPES:
        for density in DENSITIES:
            if (shape.grid, density) not in done:
                rows += measured(shape, density)
                save(rows, profile)
                print(shape, density, flush=True)
    save(rows, profile)


def undisturbed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the groups (shape and density) in whose rounds the dense call took longer than it does elsewhere."""
    dense = {(tuple(row["grid"]), row["asked"]): row["milliseconds"] for row in rows if row["rules"] == ["dense"]}
    least = {grid: min(time for (other, _), time in dense.items() if other == grid) for grid, _ in dense}
    slow = {key for key, time in dense.items() if time > DISTURBED * least[key[0]]}
    return [row for row in rows if (tuple(row["grid"]), row["asked"]) not in slow]


def measured(shape: SiteShape, density: float) -> list[dict[str, Any]]:
    """Every pattern at one density, with and without a tail; a mixed site; the dense call."""
    sites = [(Rule(name, density),) for name in PATTERNS if name not in WITHOUT_DENSITY]
    sites.append(tuple(Rule(name, density) for name in MIXED[: shape.heads]))
    return [
        {
            **asdict(shape), "asked": density, "tail": row.tail, "rules": [rule.pattern for rule in row.rules],
            "milliseconds": round(row.seconds * 1e3, 3), "median_ms": round(row.median * 1e3, 3),
        }
        for row in measure(sites, shape, torch.float32, torch.device("cpu"))
    ]  # fmt: skip


def save(rows: list[dict[str, Any]], profile: str) -> None:
    """The rows with both predictions, and their errors."""
    models = {"calibrated": CostModel(load_profile(profile)), "data_sheet": CostModel(load_profile(DATA_SHEET))}
    errors = {}
    for name, model in models.items():
        for row in rows:
            row[f"{name}_ms"] = round(predicted(model, row) * 1e3, 3)
        errors[name] = summary(rows, name)
    result = {
        "machine": detect(), "torch": torch.__version__, "threads": torch.get_num_threads(), "data_sheet": DATA_SHEET,
        "calibrated": json.loads(models["calibrated"].profile.to_json()), "errors": errors, "rows": rows,
    }  # fmt: skip
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def predicted(model: CostModel, row: dict[str, Any]) -> float:
    """Seconds."""
    shape = SiteShape(tuple(row["grid"]), row["batch"], row["heads"], row["head_dim"])
    rules = [Rule(name, 1.0 if name == "dense" else row["asked"]) for name in row["rules"]]
    return model.site(rules, shape, tail=row["tail"])


def summary(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Mean, median and largest absolute relative error of a model's predictions, the mean error with its sign, and the
    mean absolute one against median times."""
    errors = [row[f"{name}_ms"] / row["milliseconds"] - 1 for row in rows]
    of_medians = [abs(row[f"{name}_ms"] / row["median_ms"] - 1) for row in rows]
    sizes = [abs(error) for error in errors]
    return {
        "mean": round(statistics.mean(sizes), 4), "median": round(statistics.median(sizes), 4),
        "largest": round(max(sizes), 4), "signed": round(statistics.mean(errors), 4),
        "mean_of_medians": round(statistics.mean(of_medians), 4),
    }  # fmt: skip


def plot() -> None:
    """The scatter, and the error by shape and tail as Markdown."""
    import matplotlib.pyplot as plt

    result = json.loads(RESULTS.read_text())
    rows = result["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.4), sharex=True, sharey=True, layout="constrained")
    titles = {"calibrated": "calibrated on this machine", "data_sheet": f"from the data sheet ({DATA_SHEET})"}
    limits = [0.8 * min(row["milliseconds"] for row in rows), 1.2 * max(row["milliseconds"] for row in rows)]
    for panel, (name, title) in zip(axes, titles.items(), strict=True):
        panel.fill_between(limits, [0.9 * x for x in limits], [1.1 * x for x in limits], color="0.9", label="±10 %")
        panel.plot(limits, limits, color="0.5", linewidth=0.8)
        for kind in ("others", *SHOWN):
            mine = [row for row in rows if kind_of(row) == kind]
            panel.scatter(
                [row["milliseconds"] for row in mine], [row[f"{name}_ms"] for row in mine], s=16, label=kind,
                color="0.65" if kind == "others" else None, alpha=0.85, linewidths=0,
            )  # fmt: skip
        error = result["errors"][name]
        panel.set_title(f"{title}\nmean error {error['mean']:.1%}, largest {error['largest']:.0%}", fontsize=10)
        panel.set(xscale="log", yscale="log", xlim=limits, ylim=limits, xlabel="measured, ms (fastest of five rounds)")
    axes[0].set_ylabel("predicted, ms")
    axes[0].legend(fontsize=8, frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    print("| shape | tail | calls | calibrated | data sheet |\n|---|---|---|---|---|")
    for shape in SHAPES:
        for tail in ("none", "pooled"):
            mine = [row for row in rows if tuple(row["grid"]) == shape.grid and row["tail"] == tail]
            if mine:
                errors = " | ".join(f"{summary(mine, name)['mean']:.1%}" for name in titles)
                grid = "×".join(map(str, shape.grid))
                print(f"| {grid}, {shape.heads} heads of {shape.head_dim} | {tail} | {len(mine)} | {errors} |")


def kind_of(row: dict[str, Any]) -> str:
    """The name under which a row is drawn."""
    name = row["rules"][0] if len(row["rules"]) == 1 else "mixed"
    return name if name in SHOWN else "others"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", "plot"))
    parser.add_argument("--profile", default=str(PROFILE))
    arguments = parser.parse_args()
    if arguments.command == "measure":
        run(arguments.profile)
    else:
        plot()
