"""Reports of a plan: what its heads do, what it is worth, and what the search that found it cost.

This file says what a report shows, in words and numbers. `report_page.py` draws it as a web page that needs no network
(plotly), `report_picture.py` as a picture (matplotlib).
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from pointillist.accel.plan import Plan, Rule, Table
from pointillist.files import write_whole
from pointillist.search.record import Point, SearchRecord

NO_RECORD = (
    "No search left a record in this file, as for a plan made by hand: there are no predicted errors and times, "
    "no Pareto curve, no attention maps and no cost to show."
)
FIXED_COLOURS = {"dense": "#20304f", "skip": "#d8d4ca"}
COLOURS = ("#2e86ab", "#e07a3f", "#4c9f70", "#b5487c", "#d9a21b", "#6b5ca5", "#2aa6a0", "#a3623a", "#8a9a2b", "#c65b5b")
PAPER, INK, KEPT, ACCENT = "#f4f1ea", "#2b2f38", "#20304f", "#d1495b"


@dataclass(frozen=True)
class Phase:
    """Sparse steps in which every head does one thing."""

    begin: float
    end: float
    """Steps whose sigma is above `end` and at most `begin`, shares of that of the first step."""
    transformer: str
    """Component name; "" is every transformer that no phase names."""
    table: Table
    """One row per layer, in it one rule per head."""
    buckets: tuple[int, ...] = ()
    """The search's step buckets that it covers."""

    @property
    def rules(self) -> list[Rule]:
        return [rule for row in self.table for rule in row]

    @property
    def kept(self) -> np.ndarray:
        """float [layers, heads]: the share of the pairs that each head keeps."""
        return np.array([[rule.kept for rule in row] for row in self.table])

    @property
    def title(self) -> str:
        steps = "all steps" if (self.begin, self.end) == (1, 0) else f"sigma {self.begin:.3g} to {self.end:.3g}"
        return f"{self.transformer}, {steps}" if self.transformer else steps


@dataclass(frozen=True)
class Example:
    """A head whose attention is worth a look."""

    layer: int
    head: int
    why: str
    """Why this one was chosen, in a few words."""
    rule: str
    """What it does; more than one thing if it changes with the steps."""
    error: float
    """Predicted relative error of its output, mean over the step buckets."""
    true_map: np.ndarray
    kept_map: np.ndarray
    """float [n, n]: attention in units of a uniform one, and the kept share of the pairs."""

    @property
    def density(self) -> float:
        return float(self.kept_map.mean())

    @property
    def recall(self) -> float:
        """About the share of the attention that lies in kept pairs: both maps are pooled."""
        return float((self.true_map * self.kept_map).mean())


def write_html(plan: Plan, record: SearchRecord | None, path: str | os.PathLike[str]) -> None:
    """Write the report as one HTML file that needs nothing else, no network either.

    Args:
        record: how a search found the plan (`SearchRecord.load`); without it the report is the map alone.

    Raises:
        ValueError: `path` does not end in .html or its folder does not exist, or plotly is not installed.
        PlanError: plan and record are not of the same model.
        OSError: the file cannot be written; then there is none.
    """
    target = check_target(path, ".html", "plotly")
    from pointillist.search.report_page import page

    write_whole(target, page(plan, record).encode())


def write_png(plan: Plan, record: SearchRecord | None, path: str | os.PathLike[str]) -> None:
    """Write the report as a picture of 1600 × 1000 pixels. Arguments and errors as of `write_html`, for .png."""
    target = check_target(path, ".png", "matplotlib")
    from pointillist.search.report_picture import picture

    write_whole(target, picture(plan, record))


def check_target(path: str | os.PathLike[str], suffix: str, package: str) -> Path:
    """`path`, if a report can be written there. Raises ValueError."""
    from importlib.util import find_spec

    target = Path(path)
    if target.suffix.lower() != suffix or target.is_dir():
        raise ValueError(f"the report's file is {os.fspath(path)!r}; it must be a file that ends in {suffix}")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {os.fspath(target.parent)!r} for the report {target.name}; make it first")
    if find_spec(package) is None:
        raise ValueError(f"a report in {suffix} needs {package}: pip install 'pointillist[search]'")
    return target


def phases(plan: Plan, record: SearchRecord | None = None) -> tuple[Phase, ...]:
    """What heads do, from the noisiest steps to the last; neighbours that do the same are one.

    Steps that the schedule makes dense by their sigma are left out; a plan that has no others gives one dense phase.
    Raises PlanError if the plan's tables fit no model, or not that of the record.
    """
    layers, heads = shape_of(plan, record)
    boundaries = () if record is None else record.boundaries
    edges = {1.0, plan.schedule.dense_above, *boundaries, *(stage.below for stage in plan.stages)}
    begins = sorted((edge for edge in edges if 0 < edge <= plan.schedule.dense_above), reverse=True)
    if not begins:
        return (Phase(1.0, 0.0, "", ((Rule("dense", 1.0),) * heads,) * layers),)
    found = []
    for transformer in ("", *sorted({stage.transformer for stage in plan.stages} - {""})):
        pieces = [
            Phase(
                begin, end, transformer, table_at(plan, begin, transformer, layers, heads), bucket_of(boundaries, begin)
            )
            for begin, end in zip(begins, [*begins[1:], 0.0], strict=True)
        ]
        for table, group in groupby(pieces, key=lambda piece: piece.table):
            same = list(group)
            buckets = tuple(dict.fromkeys(bucket for piece in same for bucket in piece.buckets))
            found.append(Phase(same[0].begin, same[-1].end, transformer, table, buckets))
    return tuple(found)


def settings(plan: Plan) -> list[tuple[str, str]]:
    """The plan but for its tables and figures, in words."""
    grid = "any" if plan.grid is None else "×".join(map(str, plan.grid)) + " tokens (T×H×W)"
    schedule = plan.schedule
    dense = [
        *([f"the first {schedule.dense_steps}"] if schedule.dense_steps else []),
        *([f"those above {schedule.dense_above:.3g} of the first one's sigma"] if schedule.dense_above < 1 else []),
        *([f"1 of {schedule.dense_every} of the others"] if schedule.dense_every else []),
    ]
    tail = plan.tail + (", and what was lost at the last dense step" if plan.residual else "")
    rows = [
        ("model", plan.model),
        ("token grid", grid),
        ("hardware", plan.hardware or "any"),
        ("dense steps", ", ".join(dense) or "none"),
        ("tail", tail),
        ("blocks", f"up to {plan.block} tokens"),
    ]
    if schedule.computed:
        but = " and those of regions" if schedule.region_after else ""
        rows.append(("reused steps", f"all but {len(schedule.computed)} sigmas{but}"))
    if plan.cache is not None:
        rows.append(("cache", str(plan.cache)))
    if plan.regions is not None:
        steps = f"behind {len(schedule.region_after)} of the computed sigmas"
        if schedule.region_from:
            steps = f"from {schedule.region_from:.3g} to {schedule.region_to:.3g} of the first sigma"
            steps += f", all in 1 of {schedule.region_every} steps"
        rows.append(("regions", f"{plan.regions}, {steps}"))
    if plan.quantized != "none":
        rows.append(("quantized", plan.quantized))
    if plan.hoist:
        rows.append(("hoisted order", plan.hoist))
    if plan.reuse_layers > 1 or plan.reuse_steps > 1:
        rows.append(("choice reused", f"for {plan.reuse_layers} layers and {plan.reuse_steps} steps"))
    if plan.dense_first_frame:
        rows.append(("first frame", "dense"))
    short = [f"fewer than {plan.min_tokens} tokens"] if plan.min_tokens else []
    costly = ["calls too dense to be faster"] if plan.break_even else []
    return [*rows, ("dense instead", ", ".join(short + costly) or "never")]


def colours(plan: Plan) -> dict[str, str]:
    """A colour for every pattern of the plan, the most used first."""
    used = Counter(rule.pattern for phase in phases(plan) for rule in phase.rules)
    free = (COLOURS[i % len(COLOURS)] for i in range(len(used)))
    return {name: FIXED_COLOURS.get(name) or next(free) for name, _ in used.most_common()}


def chosen_point(record: SearchRecord) -> Point | None:
    """The plan's own point of the Pareto curve."""
    return next((point for point in record.points if point.chosen), None)


def search_seconds(record: SearchRecord) -> dict[str, float]:
    """What the search spent, by phase, without the dense clip that it is compared with."""
    return {phase: seconds for phase, seconds in record.seconds.items() if phase != "dense clip"}


def layer_seconds(record: SearchRecord, plan: Plan) -> np.ndarray:
    """float [layers]: predicted seconds of one call under the plan, mean over the step buckets of sparse steps."""
    buckets = sorted({bucket for phase in phases(plan, record) for bucket in phase.buckets})
    return record.plan_seconds[buckets or slice(None)].astype(float).mean(0)


def examples(plan: Plan, record: SearchRecord, count: int = 4) -> tuple[Example, ...]:
    """Up to `count` heads: the worst error, the least, then for each pattern the head in the middle of its errors."""
    runs = phases(plan, record)
    error = record.errors.astype(float).mean(0)
    layers, heads = error.shape
    places = list(np.ndindex(layers, heads))
    sparse = [[run.table[layer][head].kept < 1 for run in runs] for layer, head in places]
    wanted = all if any(map(all, sparse)) else any  # heads that are never dense, if there are such
    ranked = [place for place, each in zip(places, sparse, strict=True) if wanted(each)]
    ranked.sort(key=lambda place: error[place])
    if not ranked:
        return ()
    why = {ranked[-1]: "worst error", ranked[0]: "least error"} if len(ranked) > 1 else {ranked[0]: "the sparse head"}
    used = Counter(rule.pattern for run in runs for rule in run.rules)
    for pattern, _ in used.most_common():
        times = {(i, j): sum(run.table[i][j].pattern == pattern for run in runs) for i, j in ranked}
        mine = [place for place in ranked if times[place] == max(times.values()) > 0]
        if pattern != "dense" and mine:
            why.setdefault(mine[len(mine) // 2], f"typical of {pattern}")
    return tuple(_example(record, runs, place, reason, error) for place, reason in list(why.items())[:count])


def _example(
    record: SearchRecord, runs: tuple[Phase, ...], place: tuple[int, ...], why: str, error: np.ndarray
) -> Example:
    layer, head = place
    rules = dict.fromkeys(run.table[layer][head].pattern for run in runs)
    true_map = record.true_maps[layer, head].astype(float)
    kept_map = record.kept_maps[layer, head].astype(float)
    rule = " → ".join(rules) if len(rules) < 3 else f"{len(rules)} patterns in turn"
    return Example(layer, head, why, rule, float(error[place]), true_map * len(true_map), kept_map)


def title(plan: Plan) -> str:
    return f"What each head does: {short_name(plan.name)}"


def headline(plan: Plan, record: SearchRecord | None) -> str:
    """The plan's worth in one line."""
    point = None if record is None else chosen_point(record)
    kept = point.density if point else np.mean([phase.kept.mean() for phase in phases(plan, record)])
    parts = [short_name(plan.model) if plan.model != "any" else "any model", f"heads keep {kept:.0%} of the pairs"]
    if point is not None:
        speedup, psnr = point.measured or point.predicted
        parts.append(f"{'measured' if point.measured else 'predicted'} {speedup:.2f}× faster at {psnr:.1f} dB")
    return " · ".join(parts)


def about_map(plan: Plan, record: SearchRecord | None) -> str:
    """What the map shows, in sentences; so are those below, each for its figure."""
    runs = phases(plan, record)
    used = Counter(rule.pattern for run in runs for rule in run.rules)
    total = sum(used.values())
    shares = ", ".join(f"{name} {number / total:.0%}" for name, number in used.most_common(4))
    text = "A cell is a head: its colour is the pattern; its depth, and number in %, the share of pairs that it keeps."
    if plan.schedule.dense_above < 1:
        text += f" Steps above sigma {plan.schedule.dense_above:.3g}, where the first has 1, are dense."
    if plan.schedule.dense_every:
        text += f" So is 1 of {plan.schedule.dense_every} of the others."
    if plan.schedule.computed:
        or_part = "compute a part of the tokens or " if plan.schedule.region_after else ""
        text += f" {len(plan.schedule.computed)} steps are computed, others {or_part}reuse them."
    if len({rule for run in runs for rule in run.rules}) == 1:
        rule = runs[0].rules[0]
        return f"{text} Here every head of every layer is the same: {rule.pattern}, density {rule.kept:.3g}."
    text += f" Of all heads: {shares}."
    by_layer = np.mean([run.kept.mean(1) for run in runs], axis=0)
    if by_layer.max() > by_layer.min():
        most, least = int(by_layer.argmax()), int(by_layer.argmin())
        text += f" Layer {most} keeps most ({by_layer[most]:.0%}), layer {least} least ({by_layer[least]:.0%})."
    return text


def about_cell(rule: Rule, layer: int, head: int, run: Phase, record: SearchRecord | None) -> list[str]:
    """Lines on one head in one phase: what it does, what that loses and takes."""
    lines = [f"layer {layer}, head {head}", f"{rule.pattern}, density {rule.kept:.3g}"]
    lines += [f"{name} = {value}" for name, value in rule.options]
    if record is not None and run.buckets:
        buckets = list(run.buckets)
        error, weight = record.errors[buckets, layer, head].mean(), record.sensitivity[buckets, layer].mean()
        seconds, dense = record.plan_seconds[buckets, layer].mean(), record.dense_seconds[layer]
        lines.append(f"predicted error {error:.3g}, the layer's sensitivity {weight:.2f}")
        lines.append(f"the layer's call: {duration(float(seconds))} predicted, {duration(float(dense))} dense")
    return lines


def about_points(record: SearchRecord) -> str:
    point = chosen_point(record)
    measured = sum(each.measured is not None for each in record.points)
    text = f"{len(record.points)} plans were predicted, {measured} of them measured."
    if point is None:
        return text
    text += f" This file's, ringed: predicted {point.predicted_speedup:.2f}× at {point.predicted_psnr:.1f} dB"
    if point.measured is not None:
        text += ", measured {:.2f}× at {:.1f} dB".format(*point.measured)
    return text + "."


def about_layers(plan: Plan, record: SearchRecord) -> str:
    dense, sparse = record.dense_seconds.astype(float), layer_seconds(record, plan)
    text = f"Predicted, of one attention call: {duration(dense.mean())} dense, {duration(sparse.mean())} under the plan"
    gain = dense / np.maximum(sparse, 1e-12)
    best, worst = int(gain.argmax()), int(gain.argmin())
    if best == worst or not sparse.all():
        return text + "."
    return text + f". Layer {best} gains most ({gain[best]:.1f}×), layer {worst} least ({gain[worst]:.1f}×)."


def about_examples(shown: tuple[Example, ...]) -> str:
    if not shown:
        return "Every head is dense."
    text = "Above, where a head's queries (down) look among the keys (across); below, the pairs that the plan keeps."
    best = max(shown, key=lambda each: each.recall - each.density)
    place = f"layer {best.layer}, head {best.head}"
    return text + f" In {place}, {best.density:.0%} of the pairs hold {best.recall:.0%} of the attention."


def about_cost(record: SearchRecord) -> str:
    spent = search_seconds(record)
    total = sum(spent.values())
    if not spent or total <= 0:
        return "The record does not say what the search took."
    clip = record.seconds.get("dense clip", 0)
    times = f", as long as {total / clip:.1f} dense clips of {duration(clip)}" if clip > 0 else ""
    largest = max(spent, key=lambda phase: spent[phase])
    share = spent[largest] / total
    return f"The search took {duration(total)}{times}; most went into {short_name(largest)} ({share:.0%})."


def mixed(colour: str, share: float) -> str:
    """`colour` over white, `share` of it."""
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in parts)


def duration(seconds: float) -> str:
    """Seconds as people read them: 4.1 ms, 85 s, 12 min, 3.2 h."""
    for limit, unit, name in ((1e-3, 1e-6, "µs"), (1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 3600:.3g} h"


def short_name(text: str) -> str:
    """Of names that a file brings: printable, one line, not long."""
    clean = "".join(letter if letter.isprintable() else "�" for letter in text)
    return clean if len(clean) <= 60 else clean[:59] + "…"


def shape_of(plan: Plan, record: SearchRecord | None) -> tuple[int, int]:
    """Layers and heads. A table of one row, or rows of one rule, hold for as many as there are. Raises PlanError."""
    if record is None:
        layers = max(len(table) for table in plan.tables)
        heads = max(len(row) for table in plan.tables for row in table)
    else:
        _, layers, heads = record.errors.shape
    plan.check_fits(plan.model, layers, heads)
    return layers, heads


def table_at(plan: Plan, share: float, transformer: str, layers: int, heads: int) -> Table:
    """What every head does in a step at this share of the first one's sigma."""
    rows = (plan.rules(layer, share, transformer) for layer in range(layers))
    return tuple(row * heads if len(row) == 1 else row for row in rows)


def bucket_of(boundaries: tuple[float, ...], begin: float) -> tuple[int, ...]:
    """The step bucket that a step at sigma `begin` falls into, if there are any."""
    return tuple(i for i, boundary in enumerate(boundaries) if boundary >= begin)[-1:]
