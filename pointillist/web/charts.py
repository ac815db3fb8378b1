"""Charts of a plan and of a run as HTML: the map, the steps, the layers' bill, a Pareto curve.

Strings in, strings out: nothing here knows of Gradio. Text that is not ours is escaped. Colours that must suit light
and dark are CSS variables, which `CSS` defines.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import sqrt

from pointillist.accel.patterns import PATTERNS
from pointillist.accel.plan import Rule
from pointillist.pipelines.plan_views import Planned, View
from pointillist.search import report
from pointillist.search.record import Point
from pointillist.search.report import duration, mixed, short_name

NUMBERS = 16
"""Up to so many heads, numbers fit into the cells."""
DENSITY = "#2e86ab"
REUSED = "#b9b4a8"

CSS = """
:root { --kind-dense: #64748b; --kind-sparse: #f97316; --kind-region: #14b8a6; --kind-cached: #cbd5e1; }
.dark { --kind-dense: #94a3b8; --kind-cached: #334155; }
.chart { color: var(--body-text-color); font-size: var(--text-sm); }
.chart p { margin: .15rem 0 .5rem; max-width: 90ch; }
.chart .soft { color: var(--body-text-color-subdued); }
.chart h4 { margin: .1rem 0; font-size: var(--text-md); font-weight: 600; }
.chart .scroll { overflow-x: auto; padding-bottom: 4px; }
.chart button { cursor: pointer; font: inherit; }
.chart .map { border-collapse: separate; border-spacing: 2px; margin: 0; width: 100%; table-layout: fixed; border: 0; }
.map th, .map td { padding: 0; border: 0; text-align: center; font-weight: 400; color: var(--body-text-color-subdued);
  background: none; }
.map th:first-child { width: 4.6em; text-align: right; padding-right: .5em; white-space: nowrap; }
.map td { min-width: 26px; }
.map button { display: block; width: 100%; height: 32px; border: 1px solid transparent; border-radius: 4px; padding: 0;
  font-variant-numeric: tabular-nums; }
.map.many button { height: 14px; border-radius: 1px; }
.map.many { border-spacing: 1px; }
.map button:hover { outline: 2px solid var(--primary-400); }
.map button.on { outline: 3px solid var(--primary-500); outline-offset: 1px; }
.dark .map button { border-color: #ffffff40; }
.chart-legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: .5rem; font-size: var(--text-sm); }
.chart-legend span { display: inline-flex; align-items: baseline; gap: .4em; }
.chart-legend i { width: 12px; height: 12px; border-radius: 3px; display: inline-block; flex: none; }
.dark .chart-legend i { box-shadow: 0 0 0 1px #ffffff40; }
.step-bars { display: flex; align-items: flex-end; gap: 2px; height: 84px; }
.step-bars button { flex: 1 1 0; min-width: 10px; height: 100%; display: flex; flex-direction: column; border: 0;
  justify-content: flex-end; background: none; color: var(--body-text-color-subdued); font-size: 11px;
  line-height: 1.3; padding: 0; }
.step-bars i { display: block; width: 100%; border-radius: 3px 3px 0 0; min-height: 4px; flex: none; }
.step-bars b { display: block; height: 15px; flex: none; font-weight: inherit; }
.step-bars button:hover i { filter: brightness(1.15); }
.step-bars button.on { color: var(--body-text-color); font-weight: 700; }
.step-bars button.on i { box-shadow: inset 0 0 0 2px var(--body-text-color); }
.bill { display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px .6rem; align-items: center; }
.bill .bars { display: grid; gap: 1px; }
.bill .bars i { display: block; height: 7px; border-radius: 2px; min-width: 2px; }
.bill .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.curve svg { width: 100%; max-width: 720px; height: auto; display: block; overflow: visible; }
.curve text { fill: var(--body-text-color-subdued); font-size: 12px; }
.curve .grid { stroke: var(--block-border-color); stroke-width: 1; }
.curve .line { fill: none; stroke: var(--kind-sparse); stroke-width: 2; }
.curve .move { stroke: var(--body-text-color-subdued); stroke-dasharray: 2 3; }
.curve circle { cursor: pointer; stroke: var(--kind-sparse); stroke-width: 2; fill: var(--block-background-fill); }
.curve circle.run { fill: var(--kind-dense); stroke: var(--kind-dense); }
.curve circle.hit { fill: transparent; stroke: none; }
.curve circle.ring { fill: none; stroke: #d1495b; stroke-width: 3; pointer-events: none; }
"""


def plan_map(view: View, planned: Planned | None, by: str, chosen: tuple[int, int] | None = None) -> str:
    """Layers down, heads across. A cell's colour is its pattern, paler for less that it keeps; or its density alone.

    Args:
        by: `pattern` or `density`.
        chosen: layer and head of a cell that is marked.
    """
    colours = {} if planned is None else report.colours(planned.plan)
    colours.setdefault("dense", report.FIXED_COLOURS["dense"])
    table = view.phase.table
    heads = len(table[0])
    many = heads > NUMBERS
    numbers = "".join(f"<th>{'all' if heads == 1 else head}</th>" for head in range(heads)) if not many else ""
    rows = []
    for layer, row in enumerate(table):
        cells = []
        for head, rule in enumerate(row):
            lines = report.about_cell(rule, layer, head, view.phase, None if planned is None else planned.record)
            on = ' class="on"' if (layer, head) == chosen else ""
            text = "" if many else "·" if view.kind == "cached" else f"{100 * rule.kept:.0f}"
            about = f'title="{escape(chr(10).join(lines))}" aria-label="layer {layer}, head {head}"'
            style = f'style="{_fill(rule, view.kind, by, colours)}"'
            cells.append(f'<td><button{on} data-pick="{layer},{head}" {about} {style}>{text}</button></td>')
        rows.append(f"<tr><th>{'layer ' if not many else ''}{layer}</th>{''.join(cells)}</tr>")
    top = f"<tr><th>head</th>{numbers}</tr>" if numbers else ""
    body = f'<div class="scroll"><table class="map{" many" if many else ""}">{top}{"".join(rows)}</table></div>'
    return f'<div class="chart">{body}{_legend(view, by, colours)}</div>'


def _fill(rule: Rule, kind: str, by: str, colours: dict[str, str]) -> str:
    if kind == "cached":
        return f"background:{REUSED}40;color:inherit"
    share = 0.12 + 0.88 * rule.kept if by == "density" else 0.35 + 0.65 * sqrt(rule.kept)
    colour = mixed(DENSITY if by == "density" else colours.get(rule.pattern, DENSITY), share)
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    ink = "#fff" if 0.3 * red + 0.59 * green + 0.11 * blue < 150 else "#20242c"
    return f"background:{colour};color:{ink}"


def _legend(view: View, by: str, colours: dict[str, str]) -> str:
    if view.kind == "cached":
        return '<p class="soft">This step is not computed: it reuses what others gave.</p>'
    if by == "density":
        steps = "".join(
            f'<span><i style="background:{mixed(DENSITY, 0.12 + 0.88 * share)}"></i>{share:.0%}</span>'
            for share in (0.05, 0.25, 0.5, 1.0)
        )
        return f'<div class="chart-legend"><span class="soft">of the pairs are kept:</span>{steps}</div>'
    used = dict.fromkeys(rule.pattern for rule in view.phase.rules)
    items = "".join(
        f'<span title="{escape(PATTERNS[name])}"><i style="background:{colours.get(name, DENSITY)}"></i>{name}</span>'
        for name in used
    )
    return f'<div class="chart-legend">{items}<span class="soft">numbers: % of the pairs that a head keeps</span></div>'


def steps_chart(kinds: Sequence[str], seconds: Sequence[float], chosen: int | None = None) -> str:
    """A bar for every step: its colour is what it was, its height the time that it took."""
    longest = max([*seconds, 1e-9])
    timed = list(seconds) if len(seconds) == len(kinds) else [longest] * len(kinds)
    numbered = max(1, -(-len(kinds) // 20))
    bars = "".join(
        f'<button data-pick="{step}"{" class=on" if step == chosen else ""} aria-label="step {step}: {kind}" '
        f'title="step {step}: {kind}, {duration(time)}">'
        f'<i style="height:{66 * time / longest:.1f}px;background:var(--kind-{kind})"></i>'
        f"<b>{step if step % numbered == 0 else ''}</b></button>"
        for step, (kind, time) in enumerate(zip(kinds, timed, strict=True))
    )
    present = [kind for kind in ("dense", "sparse", "region", "cached") if kind in kinds]
    names = {"cached": "reused", "region": "a part of the tokens"}
    items = "".join(
        f'<span><i style="background:var(--kind-{kind})"></i>{names.get(kind, kind)} {list(kinds).count(kind)}</span>'
        for kind in present
    )
    drawn = f'<div class="scroll"><div class="step-bars">{bars}</div></div>'
    return f'<div class="chart">{drawn}<div class="chart-legend">{items}</div></div>'


def bill(layers: Sequence[dict[str, float]], title: str, sentence: str) -> str:
    """Bars for every layer: milliseconds of a call, by what it was (`dense`, `sparse`, `region`)."""
    longest = max([ms for each in layers for ms in each.values()] or [1e-9])
    rows = []
    for layer, each in enumerate(layers):
        bars = "".join(
            f'<i style="width:{100 * ms / longest:.1f}%;background:var(--kind-{kind})" title="{kind}: {ms:.3g} ms"></i>'
            for kind, ms in each.items()
        )
        numbers = " / ".join(f"{ms:.3g}" for ms in each.values())
        rows.append(f'<span>layer {layer}</span><div class="bars">{bars}</div><span class="number">{numbers} ms</span>')
    kinds = dict.fromkeys(kind for each in layers for kind in each)
    items = "".join(f'<span><i style="background:var(--kind-{kind})"></i>{kind}</span>' for kind in kinds)
    return (
        f'<div class="chart"><h4>{escape(title)}</h4><p class="soft">{escape(sentence)}</p>'
        f'<div class="bill">{"".join(rows)}</div><div class="chart-legend">{items}</div></div>'
    )


WIDTH, HEIGHT, LEFT, BELOW = 640, 320, 46, 34


def curve(points: Sequence[Point], chosen: int | None = None) -> str:
    """Speed-up against PSNR: predictions as a line, what was run as full dots; a point can be picked by its number."""
    if not points:
        return '<div class="chart soft">The curve appears when everything is measured.</div>'
    every = [place for point in points for place in (point.predicted, point.measured) if place is not None]
    x, y = (_scale([place[axis] for place in every]) for axis in (0, 1))

    def at(place: tuple[float, float]) -> tuple[float, float]:
        across = LEFT + (place[0] - x[0]) / (x[-1] - x[0]) * (WIDTH - LEFT - 12)
        return across, 10 + (y[-1] - place[1]) / (y[-1] - y[0]) * (HEIGHT - BELOW - 10)

    parts = []
    for value in y:
        height = at((x[0], value))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x:
        parts.append(f'<text x="{at((value, y[0]))[0]:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{value:g}×</text>')
    line = " ".join("{:.1f},{:.1f}".format(*at(point.predicted)) for point in points)
    parts.append(f'<polyline class="line" points="{line}"/>')
    dots = []
    for number, point in enumerate(points):
        before, place = at(point.predicted), at(point.measured or point.predicted)
        if point.measured is not None:
            ends = "x1='{:.1f}' y1='{:.1f}' x2='{:.1f}' y2='{:.1f}'".format(*before, *place)
            parts.append(f'<line class="move" {ends}/>')
            dots.append(_dot(before, number, point, "", 4))
        dots.append(_dot(place, number, point, "run" if point.measured else "", 6))
        if number == chosen:
            dots.append(f'<circle class="ring" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="11"/>')
    legend = (
        '<div class="chart-legend"><span><i style="border:2px solid var(--kind-sparse)"></i>predicted</span>'
        '<span><i style="background:var(--kind-dense)"></i>run on a held-out prompt</span>'
        '<span class="soft">across: speed-up of denoising; up: PSNR against dense, dB</span></div>'
    )
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}{"".join(dots)}</svg>'
    return f'<div class="chart curve">{drawn}{legend}</div>'


def _dot(place: tuple[float, float], number: int, point: Point, kind: str, radius: int) -> str:
    speedup, psnr = point.measured if kind and point.measured else point.predicted
    text = escape(f"{short_name(point.name)}: {speedup:.2f}×, {psnr:.1f} dB {'measured' if kind else 'predicted'}")
    middle = f'cx="{place[0]:.1f}" cy="{place[1]:.1f}"'
    return (
        f'<g data-pick="{number}"><title>{text}</title><circle class="{kind}" {middle} r="{radius}"/>'
        f'<circle class="hit" {middle} r="14"/></g>'
    )


def _scale(values: Sequence[float]) -> list[float]:
    """Round numbers that enclose all values."""
    least, most = min(values), max(values)
    span = max(most - least, 0.1)
    step = next(size for size in (0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if span / size <= 6)
    first, last = int(least // step), int(-(-most // step))
    return [round(step * number, 6) for number in range(first, max(last, first + 1) + 1)]


def describe(point: Point) -> str:
    """A point in words."""
    told = f"{short_name(point.name)}: predicted {point.predicted_speedup:.2f}× at {point.predicted_psnr:.1f} dB"
    if point.measured is not None:
        told += "; measured {:.2f}× at {:.1f} dB".format(*point.measured)
    elif point.measured_psnr is not None:
        told += f"; measured {point.measured_psnr:.1f} dB"
    return told
