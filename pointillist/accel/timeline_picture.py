"""A picture of one generation: what each step was, what the cache went by, and which tokens were computed how often."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

from pointillist.accel.report import Report
from pointillist.files import write_whole

COLOURS = {"dense": "#20304f", "sparse": "#2e86ab", "region": "#d9a441", "cached": "#e3e0d8"}
AGES = ("#20304f", "#55729a", "#8fb0cc", "#c9dbe8", "#eecfa4", "#d9a441", "#b5651d")


def write_timeline(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the picture of a report, a PNG. Raises OSError; ValueError if nothing was generated."""
    if not report.kinds:
        raise ValueError("there is no generation to draw; run the pipeline first")
    write_whole(Path(path), picture(report))


def picture(report: Report) -> bytes:
    """The PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = ["kinds", *(["distances"] if report.distances else []), *(["ages"] if report.ages else [])]
    heights = [{"kinds": 0.6, "distances": 1.2, "ages": 1.2}[panel] for panel in panels]
    figure = Figure(figsize=(10, 1.2 + 1.5 * sum(heights) + (2 if report.refreshed else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    above: Any = figure
    if report.refreshed:
        above, below = figure.subfigures(2, 1, height_ratios=(1.5 * sum(heights), 2))  # type: ignore[misc]
        _refreshed(below, report)
    axes = above.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    steps = range(len(report.kinds))
    for panel, axis in zip(panels, axes, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        if panel == "kinds":
            axis.bar(steps, 1, width=0.92, color=[COLOURS[kind] for kind in report.kinds])
            axis.set(yticks=[], xlim=(-0.6, len(report.kinds) - 0.4))
            axis.spines["left"].set_visible(False)
            present = [kind for kind in COLOURS if kind in report.kinds]
            handles = [Patch(color=COLOURS[kind], label=f"{kind} {report.steps[kind]}") for kind in present]
            axis.legend(handles=handles, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        elif panel == "distances":
            axis.plot(list(report.distances), list(report.distances.values()), "o-", color="#d1495b", markersize=4)
            axis.set_ylabel("distance")
        else:
            _ages(axis, report)
    axes[-1].set_xlabel("step")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _ages(axis: Any, report: Report) -> None:
    """Bars of how many tokens had not been computed for 0, 1, 2 … steps."""
    tokens = max(sum(counts) for counts in report.ages.values())
    for step, counts in report.ages.items():
        bottom = 0.0
        for age, count in enumerate(counts):
            axis.bar(step, count / tokens, width=0.92, bottom=bottom, color=AGES[min(age, len(AGES) - 1)])
            bottom += count / tokens
    axis.set(ylabel="tokens by age", ylim=(0, 1))


def _refreshed(figure: Any, report: Report) -> None:
    """A map of every latent frame: in what share of the steps its tokens were computed."""
    frames, height, width = report.grid
    axes = figure.subplots(1, frames, squeeze=False)[0]
    for frame, axis in enumerate(axes):
        first = frame * height * width
        rows = [report.refreshed[first + row * width : first + (row + 1) * width] for row in range(height)]
        image = axis.imshow(rows, vmin=0, vmax=1, cmap="cividis")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"frame {frame}", fontsize=8)
    figure.colorbar(image, ax=list(axes), shrink=0.6, label="steps computed")
