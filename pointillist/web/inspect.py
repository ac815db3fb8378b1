"""Inspect: what a plan does with every head, what the steps took, and what a head and a token look at."""

from __future__ import annotations

from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from pointillist.accel.plan import PlanError
from pointillist.pipelines.again import facts_of, request_of
from pointillist.pipelines.engine import Engine, Job
from pointillist.pipelines.inspect import InspectRequest, Recording, Recordings, frames_of
from pointillist.pipelines.plan_views import Planned, View, plan_of, shipped, views_of
from pointillist.pipelines.video import OutputError, read_frames
from pointillist.search import report
from pointillist.web import charts, pictures
from pointillist.web.job_panel import JobPanel, failure
from pointillist.web.pick import picked, picker, place_in
from pointillist.web.shared import Shared

CSS = f"{charts.CSS}{pictures.CSS}"
CLIP = "the clip in hand"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

Place = tuple[int, int] | None
"""Layer and head."""


class Look:
    """What is looked into: a clip with its plan, or a plan alone."""

    def __init__(self, shared: Shared, recordings: Recordings, source: str, name: str) -> None:
        """Raises OutputError and PlanError for what cannot be looked into."""
        self.recordings, self.clip = recordings, None
        self.facts: dict[str, Any] = {}
        self.planned: Planned | None
        if source != CLIP:
            path = shipped().get(source)
            if path is None:
                raise PlanError(f"there is no plan {source!r:.60}")
            self.planned = Planned.load(path)
            self.views: tuple[View, ...] = self.planned.views
            return
        self.clip = shared.outputs.path(name)
        if self.clip is None:
            raise OutputError("no clip is in hand: generate one, choose one in the gallery, or look into a plan")
        self.facts = facts_of(self.clip)
        if not {"kinds", "sigmas", "grid", "heads", "call_ms"} <= self.facts.keys():
            raise OutputError("this clip does not say what its steps did; generate it again to look into it")
        self.planned = plan_of(self.facts, request_of(self.clip, self.facts))
        self.views = views_of(self.facts, self.planned)

    def recording(self, step: int) -> Recording | None:
        """Of the clip's step, if there is one."""
        return None if self.clip is None else self.recordings.find(self.clip, step)

    @property
    def title(self) -> str:
        if self.planned is not None and self.clip is None:
            return f"{report.title(self.planned.plan)}. {report.headline(self.planned.plan, self.planned.record)}"
        density = self.facts.get("density")
        plan = f"plan {self.facts['plan']}" + (f", density {density:.2f} in sparse steps" if density else "")
        return f"“{self.facts['prompt']}”, {self.facts['steps']} steps, {self.facts['tokens']} tokens, {plan}"


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    recordings = Recordings(shared.outputs.folder / "recordings")
    place, token, recorded = gr.State(None), gr.State(None), gr.State("")
    with gr.Row():
        source = gr.Dropdown([CLIP, *shipped()], value=CLIP, label="Look into", elem_id="inspect-source", scale=2)
        by = gr.Radio(["pattern", "density"], value="pattern", label="Colour of a head", elem_id="inspect-by")
    title = gr.HTML(elem_id="inspect-title")
    steps = picker("inspect-steps")
    step = gr.Slider(0, 1, value=0, step=1, label="Step", elem_id="inspect-step", visible=False)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            the_map = picker("inspect-map")
        with gr.Column(scale=2, min_width=300):
            bill = gr.HTML(elem_id="inspect-bill")
    head = gr.HTML(elem_id="inspect-head")
    record = gr.Button("Look into this step", elem_id="inspect-record", visible=False, variant="primary")
    panel = JobPanel(engine, shared, "inspect", lambda job: _finished(job), [recorded, step])
    film = picker("inspect-film")
    regions = gr.HTML(elem_id="inspect-regions")

    def look(source: str, name: str) -> Look | str:
        try:
            return Look(shared, recordings, source, name)
        except (OutputError, PlanError) as error:
            return str(error)

    def opened(source: str, name: str, by: str) -> list[Any]:
        """Another clip or plan."""
        found = look(source, name)
        if isinstance(found, str):
            hidden = gr.Slider(visible=False)
            return [f'<div class="chart soft">{escape(found)}</div>', hidden, "", "", "", None, None, *_nothing()]
        number = _first(found.views)
        slider = gr.Slider(0, max(1, len(found.views) - 1), number, visible=len(found.views) > 1)
        head_title = f'<div class="chart">{escape(found.title)}</div>'
        return [
            head_title, slider, *_overview(found, number, by, None), _bill(found), None, None,
            *_closer(found, number, None, None),
        ]  # fmt: skip

    def moved(source: str, name: str, by: str, number: float, place: Place, token: int | None) -> list[Any]:
        """Another step or colour."""
        found = look(source, name)
        if isinstance(found, str):
            return [gr.skip()] * 2 + _nothing()
        return [*_overview(found, int(number), by, place), *_closer(found, int(number), place, token)]

    def stepped(source: str, name: str, event: gr.EventData) -> Any:
        found, chosen = look(source, name), picked(event, 1)
        return gr.skip() if isinstance(found, str) or not chosen or chosen[0] >= len(found.views) else chosen[0]

    def clicked(source: str, name: str, by: str, number: float, token: int | None, event: gr.EventData) -> list[Any]:
        """A head of the map."""
        found, chosen = look(source, name), picked(event, 2)
        if isinstance(found, str) or chosen is None:
            return [gr.skip()] * 7
        at: Place = (chosen[0], chosen[1])
        return [at, *_overview(found, int(number), by, at), *_closer(found, int(number), at, token)]

    def pointed(source: str, name: str, number: float, place: Place, event: gr.EventData) -> list[Any]:
        """A token of the film."""
        found, chosen = look(source, name), picked(event, 1)
        recording = None if isinstance(found, str) else found.recording(int(number))
        if isinstance(found, str) or chosen is None or recording is None or chosen[0] >= recording.grid[0]:
            return [gr.skip(), gr.skip()]
        _, rows, columns = recording.grid
        column, row = place_in(event, columns, rows)
        at = (chosen[0] * rows + row) * columns + column
        return [at, _closer(found, int(number), place, at)[2]]

    def begin(source: str, name: str, number: float, place: Place) -> list[Any]:
        found = look(source, name)
        if isinstance(found, str) or found.clip is None:
            return panel.refuse(found if isinstance(found, str) else "a plan alone has no steps to look into")
        try:
            recordings.make_room()
            layer = place[0] if place else 0
            output = recordings.path(found.clip, int(number))
            return panel.begin(engine.submit(InspectRequest(found.clip, output, int(number), layer)))
        except (ValueError, OSError) as error:
            return panel.refuse(str(error))

    overview, closer = [steps, the_map], [head, record, film, regions]
    everything = [title, step, *overview, bill, place, token, *closer]
    where = [source, shared.clip]
    for event in (source.change, shared.clip.change, shared.page.load):
        event(opened, [*where, by], everything, **QUIET)
    for change in (step.change, by.change, recorded.change):
        change(moved, [*where, by, step, place, token], [*overview, *closer], **QUIET)
    steps.click(stepped, where, step, **QUIET)
    the_map.click(clicked, [*where, by, step, token], [place, *overview, *closer], **QUIET)
    film.click(pointed, [*where, step, place], [token, film], **QUIET)
    record.click(begin, [*where, step, place], panel.begun, **QUIET)


def _finished(job: Job) -> list[Any]:
    recording: Recording = job.result()
    return [f"{recording.path.name} {job.ended}", recording.step]


def _first(views: tuple[View, ...]) -> int:
    """The step that is shown first: in the middle of the sparse ones."""
    sparse = [number for number, view in enumerate(views) if view.kind == "sparse"] or list(range(len(views)))
    return sparse[len(sparse) // 2]


def _overview(found: Look, number: int, by: str, place: Place) -> list[str]:
    """The steps and the map."""
    number = min(number, len(found.views) - 1)
    view = found.views[number]
    steps = ""
    if found.clip is not None:
        steps = charts.steps_chart([each.kind for each in found.views], found.facts["step_seconds"], number)
    return [steps, charts.plan_map(view, found.planned, by, place)]


def _bill(found: Look) -> str:
    """What every layer's attention took, or is predicted to take."""
    parts = []
    if found.clip is not None:
        layers = list(found.facts["call_ms"].values())
        parts.append(charts.bill(layers, "Time of a layer's attention call", "Measured in this clip, milliseconds."))
    record = None if found.planned is None else found.planned.record
    if found.clip is None and found.planned is not None and record is not None:
        dense, sparse = record.dense_seconds * 1e3, report.layer_seconds(record, found.planned.plan) * 1e3
        layers = [{"dense": float(a), "sparse": float(b)} for a, b in zip(dense, sparse, strict=True)]
        parts.append(charts.bill(layers, "Time of a layer's attention call", "Predicted by the search, milliseconds."))
        parts.append(f'<div class="chart soft">{escape(report.about_layers(found.planned.plan, record))}</div>')
    return "".join(parts)


def _nothing() -> list[Any]:
    return ["", gr.Button(visible=False), "", ""]


def _closer(found: Look, number: int, place: Place, token: int | None) -> list[Any]:
    """The head, the button to look into the step, the film, the regions."""
    recording = found.recording(number)
    can = found.clip is not None and found.views[min(number, len(found.views) - 1)].kind in ("dense", "sparse")
    offer = gr.Button(f"Look into step {number}", visible=can and (recording is None or _lacks(recording, place)))
    regions = ""
    if recording is not None and recording.refreshed is not None:
        regions = (
            '<div class="chart"><h4>Refreshed regions</h4><p class="soft">In what share of the steps each token was '
        )
        regions += f"computed: pale in few, dark in all.</p></div>{pictures.refreshed(recording.refreshed)}"
    if place is None:
        return [_hint(found, can), offer, "", regions]
    layer, head = place
    heading = f'<div class="chart"><h4>Layer {layer}, head {head}</h4>{{}}</div>'
    if recording is not None and place in recording.kept_places:
        rule = f'<p class="soft">Step {number} of this clip, the branch with the prompt.</p>'
        pair = pictures.head_pair(recording.attention(*place), recording.kept(*place), recording.grid[0])
        return [heading.format(rule) + pair, offer, _film(recording, place, token), regions]
    record = None if found.planned is None else found.planned.record
    shape = (0, 0) if record is None else record.true_maps.shape[:2]
    if record is not None and layer < shape[0] and head < shape[1]:
        true, kept = record.true_maps[layer, head].astype(float), record.kept_maps[layer, head].astype(float)
        said = "As the search recorded it, of a prompt that it calibrated on." + (
            " Look into this step to see it in this clip." if can else ""
        )
        frames = found.planned.plan.grid[0] if found.planned is not None and found.planned.plan.grid else 1
        pair = pictures.head_pair(true * len(true), kept, frames)
        return [heading.format(f'<p class="soft">{said}</p>') + pair, offer, "", regions]
    return [
        heading.format("<p>Look into this step to see what this head looks at.</p>" if can else ""),
        offer,
        "",
        regions,
    ]


def _lacks(recording: Recording, place: Place) -> bool:
    return place is not None and place not in recording.kept_places


def _hint(found: Look, can: bool) -> str:
    more = ", and look into a step of the clip to see what its tokens look at" if can else ""
    text = f"Click a head in the map to see where it looks and what the plan keeps of that{more}."
    return f'<div class="chart soft">{text}</div>'


def _film(recording: Recording, place: tuple[int, int], token: int | None) -> str:
    times, rows, columns = recording.grid
    middle = (times // 2 * rows + rows // 2) * columns + columns // 2
    at = middle if token is None or token >= times * rows * columns else token
    try:
        shown = _frames(recording.clip, recording.clip.stat().st_mtime, times, recording.facts["frames"])
    except OSError as error:
        return failure(str(error))
    return '<div class="chart"><h4>What a token sees</h4></div>' + pictures.film(shown, recording.seen(*place, at), at)


@lru_cache(maxsize=1)
def _frames(clip: Path, changed: float, times: int, frames: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: one for each latent frame. `changed` tells files of one name apart."""
    return read_frames(clip, frames_of(times, frames))
