"""The report as one HTML page that needs no network: figures by plotly, its script inside."""

from __future__ import annotations

from collections import Counter
from html import escape
from math import sqrt
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from pointillist.accel.patterns import PATTERNS
from pointillist.accel.plan import Plan, Rule
from pointillist.search import report
from pointillist.search.record import SearchRecord
from pointillist.search.report import ACCENT, INK, KEPT, PAPER, Phase, duration, short_name

PANELS = {1: 1, 2: 2, 4: 2}
"""So many maps lie side by side, by their number; else 3."""
NUMBERS = 16
"""Up to so many heads, numbers fit into the cells of a map; beyond, a pointer's touch tells them."""
GREY, LINE = "#c9c5bb", "#5b6270"
ATTENTION = [[0, "#fbf9f4"], [0.35, "#bcd3df"], [0.7, "#2e86ab"], [1, "#14213a"]]

STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0; background: {PAPER}; color: {INK}; font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 40px 20px 60px; }}
h1 {{ font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }}
h2 {{ font-size: 19px; margin: 0 0 4px; }}
p {{ margin: 0 0 10px; max-width: 80ch; }}
.lead {{ font-size: 17px; color: #565d6b; overflow-wrap: anywhere; }}
section {{ background: #fff; border-radius: 12px; padding: 22px 24px 18px; margin-top: 20px;
  box-shadow: 0 1px 2px #0000000f, 0 4px 16px #0000000a; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin-top: 22px; }}
.tile {{ background: #fff; border-radius: 12px; padding: 14px 18px; box-shadow: 0 1px 2px #0000000f; }}
.tile b {{ display: block; font-size: 26px; line-height: 1.25; font-variant-numeric: tabular-nums; }}
.tile span {{ color: #6b7280; font-size: 14px; }}
.pair {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 20px; }}
.wide {{ overflow-x: auto; }}
.wide > div {{ min-width: 800px; }}
ul.legend {{ list-style: none; margin: 8px 0 0; padding: 0; display: grid; gap: 4px 24px;
  grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); font-size: 14px; color: #565d6b; }}
ul.legend i {{ display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 8px; }}
ul.legend b {{ color: {INK}; }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 4px 22px 4px 0; border-bottom: 1px solid #eceae4; font-weight: normal;
  overflow-wrap: anywhere; }}
th {{ color: #6b7280; }}
tr.chosen td {{ color: {ACCENT}; font-weight: 600; }}
summary {{ cursor: pointer; font-weight: 600; }}
@media (max-width: 760px) {{ .pair, ul.legend {{ grid-template-columns: 1fr; }} main {{ padding: 20px 10px; }} }}
"""
NOTHING_FROM_OUTSIDE = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(plan: Plan, record: SearchRecord | None) -> str:
    """The whole HTML. Raises PlanError if the plan and the record are not of the same model."""
    name = escape(report.title(plan))
    parts = [f"<h1>{name}</h1><p class=lead>{escape(report.headline(plan, record))}</p>"]
    if record is not None:
        parts.append(_tiles(plan, record))
    parts.append(_section("The map", report.about_map(plan, record), _draw(_map(plan, record), "map"), _legend(plan)))
    if record is None:
        parts.append(f"<section><h2>The rest</h2><p>{report.NO_RECORD}</p></section>")
    else:
        parts += _of_search(plan, record)
    parts.append(_facts(plan, record))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING_FROM_OUTSIDE}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f"<script>{get_plotlyjs()}</script></head><body><main>{''.join(parts)}</main></body></html>"
    )


def _of_search(plan: Plan, record: SearchRecord) -> list[str]:
    shown = report.examples(plan, record)
    attention = f'<div class="wide"><div>{_draw(_attention(shown), "attention")}</div></div>' if shown else ""
    return [
        _section("True attention, and what the plan keeps of it", report.about_examples(shown), attention),
        '<div class="pair">',
        _section("Speed against quality", report.about_points(record), _draw(_pareto(record), "pareto")),
        _section("Time per layer", report.about_layers(plan, record), _draw(_layers(plan, record), "layers")),
        "</div>",
        _section("What the search cost", report.about_cost(record), _draw(_cost(record), "cost")),
    ]


def _section(title: str, sentence: str, *content: str) -> str:
    return f"<section><h2>{title}</h2><p>{escape(sentence)}</p>{''.join(content)}</section>"


def _tiles(plan: Plan, record: SearchRecord) -> str:
    point, spent, clip = report.chosen_point(record), report.search_seconds(record), record.seconds.get("dense clip", 0)
    tiles = []
    if point is not None:
        speedup, psnr = point.measured or point.predicted
        how = "measured" if point.measured else "predicted"
        tiles += [(f"{speedup:.2f}×", f"faster, {how}"), (f"{psnr:.1f} dB", f"PSNR, {how}")]
        tiles.append((f"{point.density:.0%}", "density of sparse steps"))
    tiles.append((f"{len(plan.patterns)}", "patterns" if len(plan.patterns) > 1 else "pattern"))
    tiles.append((duration(sum(spent.values())), "of search"))
    if clip > 0:
        tiles.append((f"{sum(spent.values()) / clip:.1f}×", "a dense clip's time"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
        + "</div>"
    )


def _legend(plan: Plan) -> str:
    items = (
        f'<li><i style="background:{colour}"></i><b>{name}</b> {escape(PATTERNS[name])}</li>'
        for name, colour in report.colours(plan).items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _map(plan: Plan, record: SearchRecord | None) -> go.Figure:
    """A panel of layers × heads for each phase. A cell's value is its pattern's number and, behind the point, depth."""
    runs, colours = report.phases(plan, record), report.colours(plan)
    layers, heads = len(runs[0].table), len(runs[0].table[0])
    columns = PANELS.get(len(runs), 3)
    rows = -(-len(runs) // columns)
    height = min(700, max(120, 34 * layers if heads <= NUMBERS else 12 * layers))
    total = rows * height + (rows - 1) * 76
    figure = make_subplots(
        rows, columns, subplot_titles=[escape(run.title) for run in runs], horizontal_spacing=0.06 / columns,
        vertical_spacing=76 / total, shared_yaxes=True,
    )  # fmt: skip
    numbers = {name: i for i, name in enumerate(colours)}
    scale = []
    for name, i in numbers.items():
        scale += [[i / len(numbers), report.mixed(colours[name], 0.35)], [(i + 0.999) / len(numbers), colours[name]]]
    scale[-1][0] = 1
    for place, run in enumerate(runs):
        figure.add_heatmap(
            z=[[numbers[rule.pattern] + 0.998 * sqrt(rule.kept) for rule in row] for row in run.table],
            text=[[f"{100 * rule.kept:.0f}" for rule in row] for row in run.table],
            texttemplate="%{text}" if heads <= NUMBERS else None,
            textfont_size=12, customdata=_hover(run, record), hovertemplate="%{customdata}<extra></extra>",
            zmin=0, zmax=len(numbers), colorscale=scale, showscale=False,
            xgap=2 if heads <= NUMBERS else 0.5, ygap=2 if heads <= NUMBERS else 0.5,
            row=place // columns + 1, col=place % columns + 1,
        )  # fmt: skip
    step = 1 if heads <= NUMBERS else 5
    figure.update_xaxes(dtick=step, title="head", title_standoff=4)
    figure.update_yaxes(autorange="reversed", dtick=1 if layers <= 20 else 5)
    figure.update_yaxes(title="layer", col=1)
    if heads == 1:
        figure.update_xaxes(tickvals=[0], ticktext=["all"])
    if layers == 1:
        figure.update_yaxes(tickvals=[0], ticktext=["all"])
    return _styled(figure, total + 80)


def _hover(run: Phase, record: SearchRecord | None) -> list[list[str]]:
    return [
        [_tell(rule, layer, head, run, record) for head, rule in enumerate(row)] for layer, row in enumerate(run.table)
    ]


def _tell(rule: Rule, layer: int, head: int, run: Phase, record: SearchRecord | None) -> str:
    place, what, *more = map(escape, report.about_cell(rule, layer, head, run, record))
    return "<br>".join([place, what.replace(rule.pattern, f"<b>{rule.pattern}</b>", 1), *more])


def _attention(shown: tuple[report.Example, ...]) -> go.Figure:
    """A column for each head: attention, in units of a uniform one, over the pairs that are kept."""
    titles = [f"<b>layer {each.layer}, head {each.head}</b><br>{each.why}" for each in shown]
    below = [f"{each.rule}<br>{each.density:.0%} of pairs, {each.recall:.0%} of attention" for each in shown]
    figure = make_subplots(
        2, len(shown), subplot_titles=titles + below, vertical_spacing=0.11, horizontal_spacing=0.02
    )  # fmt: skip
    for column, each in enumerate(shown, 1):
        figure.add_heatmap(
            z=each.true_map.clip(0, 8).round(3), zmin=0, zmax=8, colorscale=ATTENTION, row=1, col=column,
            colorbar=dict(title="× uniform", len=0.48, y=0.78, thickness=10, outlinewidth=0),
            showscale=column == len(shown),
            hovertemplate="query run %{y}, key run %{x}: %{z:.2f} × uniform<extra></extra>",
        )  # fmt: skip
        figure.add_heatmap(
            z=each.kept_map.round(3), zmin=0, zmax=1, colorscale=[[0, "#fbf9f4"], [1, KEPT]], showscale=False, row=2,
            col=column, hovertemplate="query run %{y}, key run %{x}: %{z:.0%} kept<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(showticklabels=False, constrain="domain", showline=True, linecolor=GREY, mirror=True)
    figure.update_yaxes(showticklabels=False, autorange="reversed", showline=True, linecolor=GREY, mirror=True)
    for row in (1, 2):
        for column in range(1, len(shown) + 1):
            number = (row - 1) * len(shown) + column
            figure.update_yaxes(
                scaleanchor=f"x{'' if number == 1 else number}", constrain="domain", row=row, col=column
            )
    return _styled(figure, 560)


def _pareto(record: SearchRecord) -> go.Figure:
    figure = go.Figure()
    points = sorted(record.points, key=lambda point: point.predicted_speedup)
    figure.add_scatter(
        **_places([point.predicted for point in points]), name="predicted", mode="lines+markers",
        line=dict(color="#2e86ab", width=2), marker=dict(size=7, color="#fff", line=dict(color="#2e86ab", width=2)),
        customdata=[escape(short_name(point.name)) for point in points],
        hovertemplate="%{customdata}, predicted<br>%{x:.2f}×, %{y:.1f} dB<extra></extra>",
    )  # fmt: skip
    measured = [(point, point.measured) for point in points if point.measured is not None]
    for point, place in measured:
        figure.add_scatter(
            **_places([point.predicted, place]), mode="lines", line=dict(color=GREY, dash="dot", width=1.5),
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(
        **_places([place for _, place in measured]), name="measured", mode="markers", marker=dict(size=10, color=KEPT),
        customdata=[escape(short_name(point.name)) for point, _ in measured],
        hovertemplate="%{customdata}, measured<br>%{x:.2f}×, %{y:.1f} dB<extra></extra>",
    )  # fmt: skip
    chosen = report.chosen_point(record)
    if chosen is not None:
        figure.add_scatter(
            **_places([chosen.measured or chosen.predicted]), name="this plan", mode="markers", hoverinfo="skip",
            marker=dict(size=20, symbol="circle-open", color=ACCENT, line_width=3),
        )  # fmt: skip
    figure.update_xaxes(title="speed-up of denoising", ticksuffix="×")
    figure.update_yaxes(title="PSNR against the dense clip, dB")
    return _styled(figure, 360)


def _places(points: list[tuple[float, float]]) -> dict[str, list[float]]:
    return {"x": [speedup for speedup, _ in points], "y": [psnr for _, psnr in points]}


def _layers(plan: Plan, record: SearchRecord) -> go.Figure:
    dense, sparse = record.dense_seconds.astype(float) * 1e3, report.layer_seconds(record, plan) * 1e3
    buckets = record.plan_seconds.astype(float) * 1e3
    each = ["<br>".join(f"from sigma {b:.3g}: {ms:.3g} ms" for b, ms in zip(record.boundaries, column, strict=True))
            for column in buckets.T]  # fmt: skip
    layers = list(range(len(dense)))
    figure = go.Figure()
    figure.add_bar(x=layers, y=dense, name="dense", marker_color="#d8d4ca", width=0.8,
                   hovertemplate="layer %{x}, dense: %{y:.3g} ms<extra></extra>")  # fmt: skip
    figure.add_bar(x=layers, y=sparse, name="this plan", marker_color="#2e86ab", width=0.5, customdata=each,
                   hovertemplate="layer %{x}, plan: %{y:.3g} ms<br>%{customdata}<extra></extra>")  # fmt: skip
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title="layer", dtick=1 if len(layers) <= 20 else 5, showgrid=False)
    figure.update_yaxes(title="ms of an attention call", rangemode="tozero")
    return _styled(figure, 360)


def _cost(record: SearchRecord) -> go.Figure:
    """One bar, as long as the search; below it a dense clip."""
    spent = report.search_seconds(record)
    figure = go.Figure()
    for (phase, seconds), colour in zip(spent.items(), report.COLOURS * len(spent), strict=False):
        name = escape(short_name(phase))
        figure.add_bar(x=[seconds], y=["search"], name=name, orientation="h", marker_color=colour,
                       hovertemplate=f"{name}: {duration(seconds)}<extra></extra>")  # fmt: skip
    clip = record.seconds.get("dense clip")
    if clip is not None:
        figure.add_bar(x=[clip], y=["dense clip"], name="a dense clip", orientation="h", marker_color=GREY,
                       hovertemplate=f"a dense clip: {duration(clip)}<extra></extra>")  # fmt: skip
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    figure.update_xaxes(title="seconds")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return _styled(figure, 220)


def _facts(plan: Plan, record: SearchRecord | None) -> str:
    """Tables for those who want the numbers."""
    rows = "".join(
        f"<tr><th>{name}</th><td>{escape(short_name(text))}</td></tr>" for name, text in report.settings(plan)
    )
    parts = [f"<details><summary>The plan's settings</summary><table>{rows}</table></details>"]
    figures = {f"predicted {name}": value for name, value in plan.predicted.items()}
    figures |= {f"measured {name}": value for name, value in plan.measured.items()}
    if figures:
        rows = "".join(
            f"<tr><th>{escape(short_name(name))}</th><td>{value:.4g}</td></tr>" for name, value in figures.items()
        )
        parts.append(f"<details><summary>Its figures</summary><table>{rows}</table></details>")
    if record is not None:
        parts.append(f"<details><summary>All points of the curve</summary>{_points(record)}</details>")
        rows = "".join(
            f"<tr><th>{escape(short_name(name))}</th><td>{escape(short_name(str(value)))}</td></tr>"
            for name, value in record.settings.items()
        )
        parts.append(f"<details><summary>The search's settings</summary><table>{rows}</table></details>")
    rules = Counter(rule for run in report.phases(plan, record) for rule in run.rules)
    rows = "".join(
        f"<tr><td>{rule.pattern}</td><td>{rule.kept:.3g}</td><td>"
        f"{escape(', '.join(f'{name}={value}' for name, value in rule.options))}</td><td>{number}</td></tr>"
        for rule, number in rules.most_common()
    )
    heading = "<tr><th>pattern</th><th>density</th><th>options</th><th>heads, over all maps</th></tr>"
    parts.append(f"<details><summary>All its rules</summary><table>{heading}{rows}</table></details>")
    return f"<section>{''.join(parts)}</section>"


def _points(record: SearchRecord) -> str:
    def cell(value: float | None, form: str, unit: str) -> str:
        return "<td>–</td>" if value is None else f"<td>{value:{form}}{unit}</td>"

    rows = "".join(
        f'<tr{" class=chosen" if point.chosen else ""}><td>{escape(short_name(point.name))}</td>'
        + cell(point.density, ".3f", "") + cell(point.predicted_speedup, ".2f", "×")
        + cell(point.predicted_psnr, ".2f", " dB") + cell(point.measured_speedup, ".2f", "×")
        + cell(point.measured_psnr, ".2f", " dB") + cell(point.measured_ssim, ".4f", "") + "</tr>"
        for point in record.points
    )  # fmt: skip
    names = ("plan", "density", "predicted speed-up", "predicted PSNR", "measured speed-up", "PSNR", "SSIM")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{rows}</table>"


def _styled(figure: go.Figure, height: int) -> go.Figure:
    font = 'system-ui, "Segoe UI", Roboto, sans-serif'
    figure.update_layout(
        template="none", height=height, font=dict(family=font, color=INK, size=13), paper_bgcolor="#fff",
        plot_bgcolor="#fff", margin=dict(l=54, r=20, t=44, b=44), hoverlabel=dict(bgcolor="#fff", font_family=font),
        legend=dict(orientation="h", y=1.02, yanchor="bottom", x=0),
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    grid: dict[str, Any] = dict(
        gridcolor="#eceae4", zeroline=False, fixedrange=True, ticks="", title_font_size=13, automargin=True
    )
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    return figure


def _draw(figure: go.Figure, name: str) -> str:
    config = {"displaylogo": False, "displayModeBar": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=config)
