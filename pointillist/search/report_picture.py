"""The report as one picture, 1600 × 1000 pixels, that can be read at half its size: drawn by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from math import sqrt
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from pointillist.accel.plan import Plan, Rule
from pointillist.search import report
from pointillist.search.record import SearchRecord
from pointillist.search.report import ACCENT, INK, KEPT, PAPER, Example, Phase, duration, short_name

PANELS = 4
"""So many maps have room; of more, some from the first to the last are shown."""
NUMBERS = 10
"""Up to so many heads in all panels of a row, numbers fit into the cells."""
SOFT, GREY = "#6b7280", "#d8d4ca"
ATTENTION = LinearSegmentedColormap.from_list("attention", ["#fbf9f4", "#bcd3df", "#2e86ab", "#14213a"])
STYLE: Any = {
    "font.size": 14, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#c9c5bb", "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "text.parse_math": False,
    "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.12,
}  # fmt: skip


def picture(plan: Plan, record: SearchRecord | None) -> bytes:
    """The PNG. Raises PlanError if the plan and the record are not of the same model."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 10), dpi=100, facecolor="#fff", layout="constrained")
        FigureCanvasAgg(figure)
        head, body = figure.subfigures(2, 1, height_ratios=(1, 11))  # type: ignore[misc]
        head.set_facecolor(PAPER)
        head.text(0.014, 0.62, report.title(plan), size=25, weight="bold", va="center")
        head.text(0.014, 0.2, report.headline(plan, record), size=16, color=SOFT, va="center")
        if record is None:
            _map(body, plan, record, f"{report.about_map(plan, record)} {report.NO_RECORD}", 140)
        else:
            left, right = body.subfigures(1, 2, width_ratios=(1.5, 1))
            above, below = left.subfigures(2, 1, height_ratios=(1, 1.06))
            _map(above, plan, record, report.about_map(plan, record), 92)
            _attention(below, report.examples(plan, record))
            curve, layers, cost = right.subfigures(3, 1, height_ratios=(1.3, 1, 0.5))
            _pareto(curve, record)
            _layers(layers, plan, record)
            _cost(cost, record)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _title(part: SubFigure, title: str, sentence: str, width: int) -> None:
    """A heading, and below it a sentence in lines of so many letters, both above the figure."""
    lines = ["", *textwrap.wrap(sentence, width)]  # the first is the heading's, which is a text of its own to be bold
    below = part.suptitle("\n".join(lines), x=0.02, ha="left", size=13.5, color=SOFT, linespacing=1.25)
    heading = Annotation(title, (0, 1), xycoords=below, va="top", size=13.5, weight="bold")
    heading.set_in_layout(False)
    part.add_artist(heading)


def _map(part: SubFigure, plan: Plan, record: SearchRecord | None, sentence: str, width: int) -> None:
    runs, colours = report.phases(plan, record), report.colours(plan)
    if len(runs) > PANELS:
        shown = [runs[i] for i in np.linspace(0, len(runs) - 1, PANELS).round().astype(int)]
        sentence = f"{PANELS} of {len(runs)} maps. {sentence}"
    else:
        shown = list(runs)
    _title(part, "The map", sentence, width)
    for axes, run in zip(part.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        _panel(axes, run, colours, numbers=len(shown) * len(run.table[0]) <= 3 * NUMBERS and len(run.table) <= 14)
        axes.set_ylabel("layer" if run is shown[0] else "")
    handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    part.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), handlelength=1, handleheight=1)


def _panel(axes, run: Phase, colours: dict[str, str], numbers: bool) -> None:
    pixels = np.array([[_shade(rule, colours) for rule in row] for row in run.table])
    layers, heads = pixels.shape[:2]
    axes.imshow(pixels, aspect="auto", interpolation="nearest")
    axes.set_title(run.title, size=14)
    axes.set_xlabel("head")
    axes.set_xticks(_ticks(heads), ["all"] if heads == 1 else None)
    axes.set_yticks(_ticks(layers), ["all"] if layers == 1 else None)
    axes.spines[:].set_visible(False)
    thick = 2.5 if numbers else 0.6
    axes.hlines(np.arange(layers + 1) - 0.5, -0.5, heads - 0.5, color="#fff", linewidth=thick)
    axes.vlines(np.arange(heads + 1) - 0.5, -0.5, layers - 0.5, color="#fff", linewidth=thick)
    if numbers:
        for (layer, head), kept in np.ndenumerate(run.kept):
            dark = pixels[layer, head] @ (0.3, 0.59, 0.11) < 0.55
            axes.text(head, layer, f"{100 * kept:.0f}", ha="center", va="center", color="#fff" if dark else INK)


def _shade(rule: Rule, colours: dict[str, str]) -> np.ndarray:
    """The pattern's colour, paler for less that is kept."""
    share = 0.35 + 0.65 * sqrt(rule.kept)
    return 1 - share * (1 - np.array(to_rgb(colours[rule.pattern])))


def _attention(part: SubFigure, shown: tuple[Example, ...]) -> None:
    _title(part, "True attention, and what the plan keeps of it", report.about_examples(shown), 92)
    if not shown:
        return
    grid = part.subplots(2, 4, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for (above, below), each in zip(grid.T, shown, strict=False):
        above.imshow(each.true_map, cmap=ATTENTION, vmin=0, vmax=8, interpolation="nearest")
        above.set_title(f"layer {each.layer}, head {each.head}\n{each.why}", size=13)
        below.imshow(each.kept_map, cmap=LinearSegmentedColormap.from_list("kept", [PAPER, KEPT]), vmin=0, vmax=1,
                     interpolation="nearest")  # fmt: skip
        below.set_title(f"{each.density:.0%} of pairs hold {each.recall:.0%}", size=13)


def _pareto(part: SubFigure, record: SearchRecord) -> None:
    _title(part, "Speed against quality", report.about_points(record), 56)
    axes = part.subplots()
    points = sorted(record.points, key=lambda point: point.predicted_speedup)
    style: Any = dict(color="#2e86ab", linewidth=2.5, markersize=7, markerfacecolor="#fff", label="predicted")
    axes.plot(*_places([point.predicted for point in points]), "o-", **style)
    measured = [(point.predicted, point.measured) for point in points if point.measured is not None]
    for ends in measured:
        axes.plot(*_places(ends), ":", color="#9aa0a8", linewidth=2)
    axes.plot(*_places([place for _, place in measured]), "o", color=KEPT, markersize=10, label="measured")
    chosen = report.chosen_point(record)
    if chosen is not None:
        at = chosen.measured or chosen.predicted
        axes.plot(*at, "o", color="none", markeredgecolor=ACCENT, markeredgewidth=3, markersize=20)
        axes.annotate("this plan", at, (14, 14), textcoords="offset points", color=ACCENT, weight="bold")
    axes.set(xlabel="speed-up of denoising", ylabel="PSNR, dB")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.grid(color="#eceae4")
    axes.set_axisbelow(True)
    if points:
        axes.legend(loc="best", fontsize=13)


def _places(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [speedup for speedup, _ in points], [psnr for _, psnr in points]


def _layers(part: SubFigure, plan: Plan, record: SearchRecord) -> None:
    _title(part, "Time per layer", report.about_layers(plan, record), 56)
    axes = part.subplots()
    dense, sparse = record.dense_seconds.astype(float) * 1e3, report.layer_seconds(record, plan) * 1e3
    layers = np.arange(len(dense))
    axes.bar(layers, dense, 0.8, color=GREY, label="dense")
    axes.bar(layers, sparse, 0.5, color="#2e86ab", label="this plan")
    axes.set_ylim(0, 1.3 * max(dense.max(), sparse.max(), 1e-9))
    axes.set_xticks(_ticks(len(dense)))
    axes.set(xlabel="layer", ylabel="ms per call")
    axes.legend(ncols=2, loc="upper left", fontsize=13, borderaxespad=0, handlelength=1)


def _cost(part: SubFigure, record: SearchRecord) -> None:
    """One bar, cut into the search's phases."""
    _title(part, "What the search cost", report.about_cost(record), 56)
    spent = {name: seconds for name, seconds in report.search_seconds(record).items() if seconds > 0}
    if not spent:
        return
    axes = part.subplots()
    axes.axis("off")
    total, start = sum(spent.values()), 0.0
    for (name, seconds), colour in zip(spent.items(), report.COLOURS * len(spent), strict=False):
        axes.barh(0, seconds, left=start, color=colour, edgecolor="#fff", linewidth=2)
        if seconds > 0.16 * total:
            text = f"{short_name(name)}\n{duration(seconds)}"
            axes.text(start + seconds / 2, 0, text, ha="center", va="center", color="#fff", size=12, clip_on=True)
        start += seconds
    axes.set_xlim(0, total)


def _ticks(count: int) -> list[int]:
    step = 1 if count <= 12 else 10 if count <= 100 else 100
    return list(range(0, count, step))
