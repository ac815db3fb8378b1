"""Search: from a wish to a plan, with the curve of speed against quality as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pointillist.accel.plan import PlanError
from pointillist.files import write_whole
from pointillist.hardware.profile import profile_names
from pointillist.pipelines.engine import Engine, Job
from pointillist.pipelines.load import ModelError
from pointillist.pipelines.outline import models_here, outline_of
from pointillist.pipelines.points import read_points
from pointillist.pipelines.search import SearchRequest
from pointillist.pipelines.searches import Searches
from pointillist.search.errors import SearchError
from pointillist.search.record import Point
from pointillist.search.wish import Wish
from pointillist.web import charts
from pointillist.web.controls import offered_model
from pointillist.web.job_panel import JobPanel, failure
from pointillist.web.pick import picked, picker
from pointillist.web.shared import Shared

OWN = "the model's own"
HERE = "this machine"
FASTER, BETTER = "so many times as fast", "at least so many dB"
NAMED = {"quality (little is lost)": "quality", "balanced": "balanced", "fast": "fast"}
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    searches, first = Searches(shared.outputs.folder / "searches"), outline_of("embedded")
    gr.Markdown(
        "A search runs the model densely, tries every pattern on every head, and finds which plan loses least at each "
        "speed. It takes as long as several dense clips, and goes on where it stopped."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            wish = gr.Radio([*NAMED, FASTER, BETTER], value="balanced", label="Wish", elem_id="search-wish")
            number = gr.Number(2.0, label="How many", visible=False, elem_id="search-number")
            model = gr.Dropdown(
                list(dict.fromkeys([*models_here(), *shared.models])), value="embedded", label="Model",
                allow_custom_value=shared.any_model, elem_id="search-model",
            )  # fmt: skip
            with gr.Row():
                width = _choice("Width", first.sides, "search-width")
                height = _choice("Height", first.sides, "search-height")
            with gr.Row():
                frames = _choice("Frames", first.lengths, "search-frames")
                steps = _choice("Steps", (6, 10, 20, 30, 50), "search-steps")
            with gr.Accordion("More", open=False):
                verify = gr.Checkbox(True, label="Run plans on another prompt, and correct predictions by it",
                                     elem_id="search-verify")  # fmt: skip
                hardware = gr.Dropdown([HERE, *profile_names()], value=HERE, label="For", elem_id="search-hardware")
                reuse = gr.Checkbox(True, label="Steps may reuse what others computed", elem_id="search-reuse")
            start = gr.Button("Search", variant="primary", elem_id="search-start")
            panel_place = gr.Column()
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                known = gr.Dropdown([], label="Searches", elem_id="search-known", scale=3)
                resume = gr.Button("Go on with it", elem_id="search-resume", visible=False, scale=1)
            curve = picker("search-curve", charts.curve([]))
            told = gr.HTML(elem_id="search-point")
            with gr.Row():
                use = gr.Button("Use this plan in Generate", variant="primary", visible=False, elem_id="search-use")
                save = gr.DownloadButton("Download the plan", visible=False, elem_id="search-download")
    chosen = gr.State(None)
    shown = [curve, told, use, save, chosen, resume]

    def show(name: str | None, point: int | None = None) -> list[Any]:
        """A search's curve, and one of its points."""
        folder = searches.folder_of(name or "")
        if folder is None:
            return [charts.curve([]), "", gr.Button(visible=False), gr.DownloadButton(visible=False), None, _hidden()]
        try:
            found = read_points(folder)
            over = searches.request(name or "").output.is_file()
        except (PlanError, SearchError) as error:
            return [charts.curve([]), failure(str(error)), *[gr.skip()] * 4]
        points = [each for each, _ in found]
        number = _chosen(points) if point is None or point >= len(points) else point
        words = "" if number is None else f'<div class="chart">{charts.escape(charts.describe(points[number]))}</div>'
        able = number is not None
        path = str(found[number][1]) if number is not None else None
        return [
            charts.curve(points, number), words, gr.Button(visible=able), gr.DownloadButton(visible=able, value=path),
            number, gr.Button("Go on with it", visible=not over),
        ]  # fmt: skip

    def finished(job: Job) -> list[Any]:
        return [_listed(searches, job.request.folder.name), *show(job.request.folder.name)]

    def progressed(job: Job) -> list[Any]:
        return [gr.skip(), *show(job.request.folder.name)]

    with panel_place:
        panel = JobPanel(engine, shared, "search", finished, [known, *shown], progressed)

    def begin(wish: str, number: float, model: str, *rest: Any) -> list[Any]:
        width, height, frames, steps, verify, reuse, hardware = rest
        try:
            if model not in models_here() and model not in shared.models and not shared.any_model:
                raise ValueError(f"the model {model!r:.80} is not offered here")
            asked = _wished(wish, number)
            sizes = {"width": width, "height": height, "frames": frames, "steps": steps}
            asked |= {name: _number(name, value) for name, value in sizes.items()}
            shared.outputs.new()  # refuses if there is no room
            asked |= {"verify": bool(verify), "cache": bool(reuse)}
            asked["hardware"] = hardware if hardware in profile_names() else "auto"
            return submit(searches.new(model=model, **asked))
        except (ValueError, OSError) as error:
            return [*panel.refuse(str(error)), gr.skip()]

    def go_on(name: str | None) -> list[Any]:
        try:
            request = searches.request(name or "")
            if _at_work(engine, request.folder):
                raise ValueError("this search is at work, or waits for its turn")
            return submit(request)
        except (ValueError, OSError) as error:
            return [*panel.refuse(str(error)), gr.skip()]

    def submit(request: SearchRequest) -> list[Any]:
        return [*panel.begin(engine.submit(request)), _listed(searches, request.folder.name)]

    def pointed(name: str, event: gr.EventData) -> list[Any]:
        number = picked(event, 1)
        return [gr.skip()] * len(shown) if number is None else show(name, number[0])

    def use_it(name: str, number: int | None) -> list[Any]:
        folder = searches.folder_of(name or "")
        found = [] if folder is None else read_points(folder)
        if number is None or number >= len(found):
            return [gr.skip(), gr.skip()]
        plan = shared.outputs.folder / "plans" / f"searched-{name[:15]}-point-{number}.safetensors"
        plan.parent.mkdir(exist_ok=True)
        write_whole(plan, found[number][1].read_bytes())
        return [str(plan), gr.Tabs(selected="generate")]

    wish.change(lambda wish: _number_field(wish), wish, number, **QUIET)
    model.change(lambda name: _for_model(shared, name), model, [width, height, frames], **QUIET)
    asked = [wish, number, model, width, height, frames, steps, verify, reuse, hardware]
    start.click(begin, asked, [*panel.begun, known], **QUIET)
    resume.click(go_on, known, [*panel.begun, known], **QUIET)
    known.change(show, known, shown, **QUIET)
    curve.click(pointed, known, shown, **QUIET)
    use.click(use_it, [known, chosen], [shared.plan, shared.tabs], **QUIET)
    shared.page.load(lambda: _listed(searches, None), None, known, **QUIET)


def _choice(label: str, values: Sequence[int], elem_id: str) -> gr.Dropdown:
    choices = [OWN, *map(str, values)]
    return gr.Dropdown(choices, value=OWN, label=label, elem_id=elem_id, min_width=120)


def _for_model(shared: Shared, name: str) -> list[gr.Dropdown]:
    """Width, height and frames that a model can make."""
    try:
        outline = offered_model(shared, name)
    except ModelError as error:
        gr.Warning(str(error))
        return [gr.skip()] * 3
    each = (outline.sides, outline.sides, outline.lengths)
    return [gr.Dropdown([OWN, *map(str, values)], value=OWN) for values in each]


def _number_field(wish: str) -> gr.Number:
    return {
        FASTER: gr.Number(2.0, label="How many times as fast", visible=True),
        BETTER: gr.Number(30.0, label="At least so many dB", visible=True),
    }.get(wish, gr.Number(visible=False))


def _wished(wish: str, number: float | None) -> dict[str, Any]:
    """Raises ValueError for a wish that makes no sense."""
    asked: dict[str, Any] = {"speed": NAMED.get(wish, "balanced")}
    if wish in (FASTER, BETTER):
        asked |= {"target_speedup" if wish == FASTER else "min_psnr": float(number or 0)}
    Wish(asked.get("target_speedup"), asked.get("min_psnr"), asked["speed"])
    return asked


def _number(name: str, value: Any) -> int | None:
    """Raises ValueError for what is no number."""
    if value in (None, "", OWN):
        return None
    if not str(value).isascii() or not str(value).isdigit() or len(str(value)) > 5:
        raise ValueError(f"{name} is {str(value)!r:.40}; it must be a whole number")
    return int(value)


def _listed(searches: Searches, chosen: str | None) -> gr.Dropdown:
    names = searches.names
    return gr.Dropdown([(searches.title(name), name) for name in names], value=chosen or (names[0] if names else None))


def _chosen(points: list[Point]) -> int | None:
    return next((number for number, point in enumerate(points) if point.chosen), None)


def _hidden() -> gr.Button:
    return gr.Button(visible=False)


def _at_work(engine: Engine, folder: Path) -> bool:
    """Whether a job of this search waits or runs."""
    return any(getattr(job.request, "folder", None) == folder and job.ended_with is None for job in engine.jobs)
