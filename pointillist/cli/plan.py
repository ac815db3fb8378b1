"""`pointillist plan`: look at plan files, check them, compare them."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pointillist.accel.plan import Plan, Rule
    from pointillist.search.record import SearchRecord
    from pointillist.search.report import Phase

app = typer.Typer(no_args_is_help=True, help="Look at plan files, check them, compare them.")
NOT_SETTINGS = ("table", "stages", "predicted", "measured")
CELL = 5
"""A cell of the map with a letter and a number takes so many columns of the terminal."""


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A plan file.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a report to this .html file; it needs no network.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a report to this .png file.")] = None,
) -> None:
    """Show what is in a plan: on the terminal, as JSON, or as a report."""
    from pointillist.search import report

    if html is not None:
        report.check_target(html, ".html", "plotly")
    if png is not None:
        report.check_target(png, ".png", "matplotlib")
    plan, record = _read(file)
    if html is not None:
        report.write_html(plan, record, html)
    if png is not None:
        report.write_png(plan, record, png)
    written = [str(path) for path in (html, png) if path is not None]
    if as_json:
        print(json.dumps({**asdict(plan), "search": None if record is None else record.facts()}, allow_nan=False))
    elif written:
        print("\n".join(written))
    else:
        _show(_console(), plan, record)
    if written and record is None:
        print(f"the report shows the map alone: {report.NO_RECORD}", file=sys.stderr)


@app.command()
def validate(file: Annotated[Path, typer.Argument(help="A plan file.")]) -> None:
    """Check a plan and its search's record: exit 0 if they are valid, 1 with the reason if not."""
    _, record = _read(file)
    print(f"{file} is a valid plan, {'without' if record is None else 'with'} a record of the search that found it")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A plan file.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare two plans, not how they were found: exit 0 if they are equal, 1 if they differ, 2 for what is no plan."""
    from pointillist.accel.plan import PlanError

    try:
        found = differences(_read(a)[0], _read(b)[0])
    except PlanError as error:
        raise ValueError(str(error)) from error
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        _tell(_console(), found)
    if not found["equal"]:
        raise typer.Exit(1)


def differences(a: "Plan", b: "Plan") -> dict[str, Any]:
    """What differs, as a JSON object: `equal`, `settings`, `shape`, `stages` (a run of steps each), `figures`.

    Values that differ are pairs, first that of `a`. `shape`, layers and heads, is there if heads cannot be compared.
    """
    mine, other = asdict(a), asdict(b)
    found: dict[str, Any] = {
        "settings": {
            name: [mine[name], other[name]] for name in mine if name not in NOT_SETTINGS and mine[name] != other[name]
        },
        "shape": None,
        "stages": [],
        "figures": {
            f"{kind} {name}": [mine[kind].get(name), other[kind].get(name)]
            for kind in ("predicted", "measured")
            for name in sorted({*mine[kind], *other[kind]})
            if mine[kind].get(name) != other[kind].get(name)
        },
    }
    try:
        found["stages"] = _stages(a, b)
    except ValueError:  # tables that cannot be laid over each other
        found["shape"] = [_shape(plan) for plan in (a, b)]
    return {"equal": not any(found.values()), **found}


def _stages(a: "Plan", b: "Plan") -> list[dict[str, Any]]:
    """How heads differ, by runs of steps in which neither plan changes. Raises ValueError if they have other shapes."""
    import numpy as np

    from pointillist.search.report import phases

    sides = [phases(plan) for plan in (a, b)]
    cuts = sorted({1.0, *(edge for side in sides for phase in side for edge in (phase.begin, phase.end))}, reverse=True)
    names = sorted({phase.transformer for side in sides for phase in side})
    found = []
    for name in names:
        for begin, end in pairwise(cuts):
            tables = [np.array(_serving(side, name, begin), dtype=object) for side in sides]
            pairs = list(zip(*(table.flat for table in np.broadcast_arrays(*tables)), strict=True))
            changes = Counter(_change(x, y) for x, y in pairs if x != y)
            if changes:
                density = [sum(rule.kept for rule in side) / len(pairs) for side in zip(*pairs, strict=True)]
                found.append(
                    {
                        "transformer": name, "begin": begin, "end": end, "heads": len(pairs),
                        "differ": changes.total(), "how": dict(changes.most_common()), "density": density,
                    }
                )  # fmt: skip
    return found


def _serving(side: "tuple[Phase, ...]", name: str, begin: float) -> "tuple[tuple[Rule, ...], ...]":
    """What a plan does at sigma `begin`: the phase of the transformer, or of every one; else the step is dense."""
    from pointillist.accel.plan import Rule

    here = [phase for phase in side if phase.end < begin <= phase.begin and phase.transformer in (name, "")]
    return max(here, key=lambda phase: phase.transformer == name).table if here else ((Rule("dense", 1.0),),)


def _change(a: "Rule", b: "Rule") -> str:
    if a.pattern != b.pattern:
        return f"{a.pattern} → {b.pattern}"
    return f"{a.pattern} at another density" if a.density != b.density else f"{a.pattern} with other options"


def _shape(plan: "Plan") -> list[int]:
    return [max(len(table) for table in plan.tables), max(len(row) for table in plan.tables for row in table)]


def _read(file: Path) -> "tuple[Plan, SearchRecord | None]":
    """The plan and its record, both checked, and that they are of the same model. Raises PlanError."""
    from pointillist.accel.plan import Plan
    from pointillist.search.record import SearchRecord
    from pointillist.search.report import phases

    plan, record = Plan.load(file), SearchRecord.load(file)
    phases(plan, record)
    return plan, record


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)  # a pipe has no width


def _show(console: Console, plan: "Plan", record: "SearchRecord | None") -> None:
    from pointillist.search import report

    console.print(Text(report.short_name(plan.name), style="bold"))
    for name, value in report.settings(plan):
        console.print(f"  {name:<14} {report.short_name(value)}")
    letters, colours = _letters(plan), report.colours(plan)
    runs = report.phases(plan, record)
    for run in runs:
        console.print()
        if len(set(run.rules)) == 1:
            console.print(f"{run.title}: every head is {_words(run.rules[0])}")
            continue
        console.print(f"{run.title}: a row is a layer, a column a head; mean density at the end")
        _print_map(console, run, letters, colours)
    if len({rule for run in runs for rule in run.rules}) > 1:
        console.print()
        for name in colours:
            console.print(Text(f" {letters[name]} ", style=_style(name, colours)), _use(name, runs))
    figures = sorted({*plan.predicted, *plan.measured})
    if figures:
        table = Table("figure", "predicted", "measured", title="What it is worth", title_justify="left")
        for name in figures:
            values = (plan.predicted.get(name), plan.measured.get(name))
            table.add_row(report.short_name(name), *("" if value is None else f"{value:.4g}" for value in values))
        console.print()
        console.print(table)
    console.print()
    if record is None:
        console.print(report.NO_RECORD)
        return
    console.print(_points(record))
    console.print(f"\n{report.about_cost(record)}")
    for phase, seconds in report.search_seconds(record).items():
        console.print(f"  {report.short_name(phase):<14} {report.duration(seconds)}")


def _print_map(console: Console, run: "Phase", letters: dict[str, str], colours: dict[str, str]) -> None:
    """Layers × heads. A cell is the pattern's letter, with the density in % where there is room."""
    heads = len(run.table[0])
    room = console.width - 16
    wide, spaced = CELL * heads <= room, 2 * heads <= room
    layer = 0
    for row, group in groupby(run.table):
        count = len(list(group))
        name = f"{layer}" if count == 1 else f"{layer}–{layer + count - 1}"
        line = Text(f"{name:>9} ", no_wrap=True)
        for rule in row:
            number = "" if rule.pattern in ("dense", "skip") else f"{100 * rule.density:.0f}"
            cell = f"{letters[rule.pattern]}{number if wide else ''}"
            line.append(f" {cell:<{CELL - 2}}" if wide else cell, style=_style(rule.pattern, colours))
            line.append(" " if spaced else "")
        line.append(f" {sum(rule.kept for rule in row) / heads:.2f}")
        console.print(line)
        layer += count


def _style(pattern: str, colours: dict[str, str]) -> str:
    return f"bold {'black' if pattern == 'skip' else 'white'} on {colours[pattern]}"


def _letters(plan: "Plan") -> dict[str, str]:
    """A letter for every pattern of the plan: its first one that is free, in capitals if it can be."""
    letters: dict[str, str] = {}
    for name in sorted(plan.patterns | {"dense"}):
        free = [letter for letter in name.upper() + name if letter.isalpha() and letter not in letters.values()]
        letters[name] = free[0] if free else "?"
    return letters


def _words(rule: "Rule") -> str:
    density = "" if rule.pattern in ("dense", "skip") else f" at density {rule.density:.3g}"
    options = ", ".join(f"{name}={value}" for name, value in rule.options)
    return f"{rule.pattern}{density}{f', {options}' if options else ''}"


def _use(name: str, runs: "tuple[Phase, ...]") -> str:
    """How often a pattern is used, at which densities and with which options."""
    mine = [rule for run in runs for rule in run.rules if rule.pattern == name]
    share = len(mine) / sum(len(run.rules) for run in runs)
    text = f"{name}: {share:.0%} of the heads"
    if name not in ("dense", "skip"):
        low, high = min(rule.density for rule in mine), max(rule.density for rule in mine)
        text += f", density {low:.3g}" if low == high else f", densities {low:.3g} to {high:.3g}"
    options = Counter(option for rule in mine for option in rule.options)
    return text + "".join(
        f", {key}={value} ({count / len(mine):.0%})" for (key, value), count in options.most_common(4)
    )


def _points(record: "SearchRecord") -> Table:
    from pointillist.search.report import short_name

    table = Table(title="Points of the Pareto curve, from the slowest", title_justify="left")
    for name in ("", "plan", "density", "predicted", "", "measured", "", "SSIM"):
        table.add_column(name, justify="left" if name in ("", "plan") else "right")

    def cell(value: float | None, form: str, unit: str) -> str:
        return "" if value is None else f"{value:{form}}{unit}"

    for point in record.points:
        table.add_row(
            "→" if point.chosen else "", short_name(point.name), f"{point.density:.2f}",
            cell(point.predicted_speedup, ".2f", "×"), cell(point.predicted_psnr, ".1f", " dB"),
            cell(point.measured_speedup, ".2f", "×"), cell(point.measured_psnr, ".1f", " dB"),
            cell(point.measured_ssim, ".3f", ""), style="bold" if point.chosen else None,
        )  # fmt: skip
    return table


def _tell(console: Console, found: dict[str, Any]) -> None:
    """The differences in words."""
    from pointillist.search.report import short_name

    if found["equal"]:
        console.print("the plans are equal")
        return
    for name, (a, b) in found["settings"].items():
        console.print(f"{name}: {short_name(str(a))} → {short_name(str(b))}")
    if found["shape"] is not None:
        (layers, heads), (other_layers, other_heads) = found["shape"]
        console.print(
            f"heads cannot be compared: {layers} layers of {heads} heads → {other_layers} layers of {other_heads} heads"
        )
    for stage in found["stages"]:
        how = ", ".join(f"{number} {change}" for change, number in stage["how"].items())
        where = f"{short_name(stage['transformer'])}, " if stage["transformer"] else ""
        heads = f"{stage['differ']} of {stage['heads']} heads" if stage["heads"] > 1 else "every head"
        console.print(
            f"{where}sigma {stage['begin']:.3g} to {stage['end']:.3g}: {heads} differ{'s' * (stage['heads'] == 1)} "
            f"({how}), density {stage['density'][0]:.3f} → {stage['density'][1]:.3f}"
        )
    for name, (a, b) in found["figures"].items():
        console.print(f"{short_name(name)}: {_figure(a)} → {_figure(b)}")
    if not found["settings"] and not found["stages"] and found["shape"] is None:
        console.print("settings and heads are equal; only figures differ")


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
