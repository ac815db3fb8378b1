"""Generate: from a prompt to a clip, with what it will take told before, and what happens while it runs."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr

from pointillist.pipelines.engine import Engine, Job
from pointillist.pipelines.generate import GenerateRequest
from pointillist.pipelines.outline import outline_of
from pointillist.pipelines.predict import Prediction, Predictor
from pointillist.web.controls import BY_SLIDER, CONTROLS, draw, for_model, loaded, offered, request_of
from pointillist.web.job_panel import JobPanel, duration, failure
from pointillist.web.presets import connect_drop, connect_presets
from pointillist.web.settings import chips, notes, settings_of, timeline
from pointillist.web.shared import Shared

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
CSS = """
#generate-speed .tab-like-container, #generate-speed .min_value, #generate-speed .max_value { display: none; }
.speeds { display: flex; justify-content: space-between; font-size: .85rem; margin-top: -.4rem;
  color: var(--body-text-color-subdued); }
.predicted { padding: .7rem .9rem; border-radius: 8px; background: var(--background-fill-secondary);
  border: 1px solid var(--block-border-color); }
.predicted .line { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-variant-numeric: tabular-nums; }
.predicted .line b { font-size: 1.05rem; }
.predicted .why { color: var(--body-text-color-subdued); font-size: .8rem; margin-top: .3rem; }
#generate-result:has(.job-preview) #generate-video { display: none; }
#generate-seed-row { align-items: end; }
#generate-seed-row button { margin-bottom: .35rem; }
.in-group { background: var(--block-background-fill); }
"""


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    first = outline_of("embedded")
    predictor = Predictor()
    _learn(predictor, shared)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            controls = draw(shared, first)
        with gr.Column(scale=6, min_width=320, elem_id="generate-result"):
            controls["predicted"] = gr.HTML("", elem_id="generate-predicted")
            controls["start"] = gr.Button("Generate", variant="primary", size="lg", elem_id="generate-start")
            status = gr.Column()
            video = gr.Video(
                label="Clip", elem_id="generate-video", autoplay=True, loop=True, interactive=False, height=400,
                buttons=["download"],
            )  # fmt: skip
            details = gr.HTML("", elem_id="generate-details")
            with gr.Row(visible=False, elem_id="generate-next") as then:
                compare = gr.Button("Compare with dense", size="sm", elem_id="generate-compare")
                inspect = gr.Button("Look inside", size="sm", elem_id="generate-inspect")
                repaint = gr.Button("Repaint a region", size="sm", elem_id="generate-repaint")
            with gr.Accordion("Settings of this clip", open=False, visible=False) as more:
                used = gr.JSON(show_label=False, elem_id="generate-used")
    shown = [video, details, used, then, more]

    def finished(job: Job) -> list[Any]:
        facts, path = job.result().facts, job.result().output
        predictor.learn(facts)
        return [path.name, *_show(path, facts)]

    with status:
        panel = JobPanel(engine, shared, "generate", finished, [shared.clip, *shown])
    inputs = [controls[name] for name in CONTROLS]

    def start(*values: Any) -> list[Any]:
        try:
            request = request_of(shared, dict(zip(CONTROLS, values, strict=True)), _warm(engine))
            predictor.predict(request)  # so that what does not fit is told before it waits
            return panel.begin(engine.submit(request, previews=True))
        except (ValueError, OSError) as error:
            return panel.refuse(str(error))

    def predict(*values: Any) -> str:
        try:
            asked = dict(zip(CONTROLS, values, strict=True))
            asked["prompt"] = "x"  # it takes as long for every prompt
            return predicted(predictor.predict(request_of(shared, asked, False, Path("x.mp4"))))
        except (ValueError, OSError) as error:
            return failure(str(error))

    def last(name: str) -> list[Any]:
        path = shared.outputs.path(name or "")
        facts = None if path is None else settings_of(path)
        return _nothing() if path is None or facts is None else _show(path, facts)

    controls["start"].click(start, inputs, panel.begun, **QUIET)
    controls["prompt"].submit(start, inputs, panel.begun, **QUIET)
    watched = [controls[name] for name in CONTROLS if name not in ("prompt", "negative", "seed", "keep")]
    gr.on(
        [each.change for each in watched], predict, inputs, controls["predicted"], trigger_mode="always_last", **QUIET
    )
    used.change(predict, inputs, controls["predicted"], **QUIET)  # something was learned
    shared.page.load(predict, inputs, controls["predicted"], **QUIET)
    shared.page.load(last, shared.clip, shown, **QUIET)
    controls["dice"].click(lambda: -1, None, controls["seed"], **QUIET)
    controls["again"].click(lambda facts: (facts or {}).get("seed", -1), used, controls["seed"], **QUIET)
    controls["model"].change(
        lambda name: for_model(shared, name),
        controls["model"],
        [controls[name] for name in ("width", "height", "frames", "steps", "guidance", "shift", "plan", "unfit")],
        **QUIET,
    )
    controls["plan"].change(
        lambda plan: gr.Slider(interactive=plan == BY_SLIDER), controls["plan"], controls["speed"], **QUIET
    )
    shared.settings.change(lambda facts: loaded(shared, facts), shared.settings, inputs, **QUIET)
    shared.plan.change(
        lambda path, model: offered(shared, path, model), [shared.plan, controls["model"]], controls["plan"], **QUIET
    )
    compare.click(lambda: gr.Tabs(selected="compare"), None, shared.tabs, **QUIET)
    inspect.click(lambda: gr.Tabs(selected="inspect"), None, shared.tabs, **QUIET)
    repaint.click(lambda: gr.Tabs(selected="repaint"), None, shared.tabs, **QUIET)
    connect_drop(controls["drop"], shared)
    connect_presets(controls, inputs)


def _warm(engine: Engine) -> bool:
    """Whether a generation has run: the first one is slower, and its times would say nothing."""
    return any(job.state == "done" and isinstance(job.request, GenerateRequest) for job in engine.jobs)


def predicted(it: Prediction) -> str:
    """A prediction as HTML."""
    words = [f"<b>≈ {duration(it.seconds)}</b>"]
    if it.seconds < it.dense_seconds * 0.995:
        words.append(f"{it.dense_seconds / it.seconds:.1f}× as fast as dense ({duration(it.dense_seconds)})")
    words += [f"density {it.density:.2f}", f"{it.computed} of {len(it.kinds)} steps computed", f"{it.tokens:,} tokens"]
    rough = "" if it.measured else "Rough: no run of this model was seen on this machine yet. "
    why = html.escape(f"{rough}Plan {it.plan}: {it.source}.")
    line = "".join(f"<span>{each}</span>" for each in words)
    return (
        f'<div class="predicted"><div class="line">{line}</div>{timeline(it.kinds)}<div class="why">{why}</div></div>'
    )


def _show(path: Path, facts: dict[str, Any]) -> list[Any]:
    """Values of the result's components."""
    words = chips(facts) + timeline(facts.get("kinds") or ()) + notes(facts)
    return [str(path), words, facts, gr.Row(visible=True), gr.Accordion(visible=True)]


def _nothing() -> list[Any]:
    return [gr.skip()] * 5


def _learn(predictor: Predictor, shared: Shared) -> None:
    """From the latest clips, so that the first prediction is a good one."""
    latest = [facts for path in shared.outputs.clips[:5] if (facts := settings_of(path))]
    predictor.learn_all(reversed(latest))
