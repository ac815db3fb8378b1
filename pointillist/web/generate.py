"""Generate: from a prompt to a clip, with what it will take told before, and what happens while it runs."""

from __future__ import annotations

import html
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pointillist.pipelines.engine import Engine, Job
from pointillist.pipelines.generate import SPEEDS, GenerateRequest
from pointillist.pipelines.known_plans import KnownPlan, known_plans
from pointillist.pipelines.load import ModelError
from pointillist.pipelines.outline import Outline, models_here, outline_of
from pointillist.pipelines.predict import Prediction, Predictor
from pointillist.web.job_panel import JobPanel, duration, failure
from pointillist.web.limits import STEPS, cleaned
from pointillist.web.settings import chips, notes, settings_of, timeline
from pointillist.web.shared import Shared

FPS = 16
BY_SLIDER = ""
"""The plan that the slider chooses."""
EXAMPLES = (
    "a red circle moving left on black",
    "a green star rotating on navy",
    "a blue square growing on gray",
    "a yellow triangle moving up on brown",
)
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
CONTROLS = (
    "prompt", "negative", "model", "width", "height", "frames", "steps", "guidance", "shift", "seed", "speed", "plan",
    "cache", "regions", "keep",
)  # fmt: skip
"""In the order of the handlers' arguments."""

CSS = """
#generate-speed input[type=number], #generate-speed .reset-button, #generate-speed .min_value,
#generate-speed .max_value { display: none; }
.speeds { display: flex; justify-content: space-between; font-size: .85rem; margin-top: -.4rem;
  color: var(--body-text-color-subdued); }
.predicted { padding: .7rem .9rem; border-radius: 8px; background: var(--background-fill-secondary);
  border: 1px solid var(--block-border-color); }
.predicted .line { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-variant-numeric: tabular-nums; }
.predicted .line b { font-size: 1.05rem; }
.predicted .why { color: var(--body-text-color-subdued); font-size: .8rem; margin-top: .3rem; }
#generate-result:has(.job-preview) #generate-video { display: none; }
#generate-seed-row button { min-width: 0; }
"""


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    first = outline_of("embedded")
    predictor = Predictor()
    _learn(predictor, shared)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            controls = _controls(shared, first)
        with gr.Column(scale=6, min_width=320, elem_id="generate-result"):
            status = gr.Column()
            video = gr.Video(
                label="Clip", elem_id="generate-video", autoplay=True, loop=True, interactive=False, height=480,
                buttons=["download"],
            )  # fmt: skip
            details = gr.HTML("", elem_id="generate-details")
            with gr.Row(visible=False, elem_id="generate-next") as then:
                compare = gr.Button("Compare with dense", size="sm", elem_id="generate-compare")
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
            request = _request(shared, dict(zip(CONTROLS, values, strict=True)), _warm(engine))
            predictor.predict(request)  # so that what does not fit is told before it waits
            return panel.begin(engine.submit(request, previews=True))
        except (ValueError, OSError) as error:
            return panel.refuse(str(error))

    def predict(*values: Any) -> str:
        try:
            asked = dict(zip(CONTROLS, values, strict=True))
            asked["prompt"] = "x"  # it takes as long for every prompt
            return predicted(predictor.predict(_request(shared, asked, False, Path("x.mp4"))))
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
    shared.page.load(predict, inputs, controls["predicted"], **QUIET)
    shared.page.load(last, shared.clip, shown, **QUIET)
    controls["dice"].click(lambda: -1, None, controls["seed"], **QUIET)
    controls["again"].click(lambda facts: (facts or {}).get("seed", -1), used, controls["seed"], **QUIET)
    controls["model"].change(
        lambda name: _for_model(shared, name),
        controls["model"],
        [controls[name] for name in ("width", "height", "frames", "steps", "guidance", "shift", "plan", "unfit")],
        **QUIET,
    )
    controls["plan"].change(
        lambda plan: gr.Slider(interactive=plan == BY_SLIDER), controls["plan"], controls["speed"], **QUIET
    )
    shared.settings.change(lambda facts: _loaded(shared, facts), shared.settings, inputs, **QUIET)
    shared.plan.change(
        lambda path, model: _offered(shared, path, model), [shared.plan, controls["model"]], controls["plan"], **QUIET
    )
    compare.click(lambda: gr.Tabs(selected="compare"), None, shared.tabs, **QUIET)
    repaint.click(lambda: gr.Tabs(selected="repaint"), None, shared.tabs, **QUIET)
    _connect_drop(controls["drop"], shared)
    _connect_presets(controls, inputs)


def _controls(shared: Shared, first: Outline) -> dict[str, Any]:
    """Draw them; by name."""
    call, made = first.call, {}
    made["prompt"] = gr.Textbox(
        label="Prompt", value=EXAMPLES[0], lines=3, max_lines=8, elem_id="generate-prompt", max_length=2000,
        placeholder="Describe the clip",
    )  # fmt: skip
    examples = gr.Examples(
        [[each] for each in EXAMPLES],
        made["prompt"],
        label="The embedded model draws one shape",
        api_visibility="private",
    )
    examples.dataset.elem_id = "generate-examples"
    made["negative"] = gr.Textbox(label="Negative prompt", lines=1, elem_id="generate-negative", max_length=2000)
    with gr.Row():
        made["width"] = gr.Dropdown(
            _sides(first), value=call["width"], label="Width", elem_id="generate-width", min_width=90
        )
        made["height"] = gr.Dropdown(
            _sides(first), value=call["height"], label="Height", elem_id="generate-height", min_width=90
        )
        made["frames"] = gr.Dropdown(
            _lengths(first), value=call["num_frames"], label="Length", elem_id="generate-frames", min_width=140
        )
    with gr.Row(elem_id="generate-seed-row"):
        made["seed"] = gr.Number(
            -1,
            label="Seed (-1 is random)",
            precision=0,
            minimum=-1,
            maximum=2**31 - 1,
            elem_id="generate-seed",
            scale=3,
            min_width=120,
        )
        made["dice"] = gr.Button("🎲 Random", size="sm", elem_id="generate-dice", scale=1)
        made["again"] = gr.Button("♻️ Last", size="sm", elem_id="generate-again", scale=1)
    with gr.Group():
        made["speed"] = gr.Slider(
            0,
            len(SPEEDS) - 1,
            2,
            step=1,
            label="Speed",
            elem_id="generate-speed",
            show_reset_button=False,
            info="Less of the attention is computed towards the right",
        )
        gr.HTML('<div class="speeds">' + "".join(f"<span>{each}</span>" for each in SPEEDS) + "</div>", padding=True)
        plans, unfit = _plans(shared, first)
        made["plan"] = gr.Dropdown(plans, value=BY_SLIDER, label="Plan", elem_id="generate-plan")
        made["unfit"] = gr.HTML(unfit, elem_id="generate-unfit")
        with gr.Row():
            made["cache"] = gr.Checkbox(
                True, label="Reuse steps", info="as the plan says", elem_id="generate-cache", min_width=120
            )
            made["regions"] = gr.Checkbox(
                False, label="Regions", info="compute what changes", elem_id="generate-regions", min_width=120
            )
    made["predicted"] = gr.HTML("", elem_id="generate-predicted")
    made["start"] = gr.Button("Generate", variant="primary", size="lg", elem_id="generate-start")
    with gr.Accordion("Advanced", open=False, elem_id="generate-advanced"):
        made["model"] = gr.Dropdown(
            list(dict.fromkeys([*models_here(), *shared.models])), value="embedded", label="Model",
            elem_id="generate-model", allow_custom_value=shared.any_model,
            info="embedded, or what is on this machine" + (": a Hub id or a folder" if shared.any_model else ""),
        )  # fmt: skip
        made["steps"] = gr.Slider(
            1, STEPS, call["num_inference_steps"], step=1, label="Steps", elem_id="generate-steps"
        )
        made["guidance"] = gr.Slider(
            0, 15, call["guidance_scale"], step=0.1, label="Guidance (1 is off)", elem_id="generate-guidance"
        )
        made["shift"] = gr.Slider(
            0.1,
            15,
            first.shift or 1.0,
            step=0.1,
            label="Shift",
            interactive=first.shift is not None,
            elem_id="generate-shift",
        )
        made["keep"] = gr.Checkbox(
            True, label="Keep what Repaint needs", info="a file beside the clip", elem_id="generate-keep"
        )
    with gr.Accordion("Presets, and settings from a file", open=False, elem_id="generate-presets"):
        made["drop"] = gr.File(
            label="Drop a clip that was made here",
            file_types=[".mp4", ".gif", ".png"],
            elem_id="generate-drop",
            height=110,
        )
        with gr.Row():
            made["preset"] = gr.Dropdown([], label="Presets of this browser", elem_id="generate-preset", min_width=140)
            made["preset-name"] = gr.Textbox(label="Name", max_length=40, elem_id="generate-preset-name", min_width=120)
        with gr.Row():
            made["preset-save"] = gr.Button("Save", size="sm", elem_id="generate-preset-save")
            made["preset-delete"] = gr.Button("Delete", size="sm")
    return made


def _request(shared: Shared, asked: dict[str, Any], warm: bool, output: Path | None = None) -> GenerateRequest:
    """What the controls say. Raises ValueError, and NoRoom for a full disk."""
    prompt, negative = cleaned(asked["prompt"]), cleaned(asked["negative"], "negative prompt")
    if asked["model"] not in models_here() and asked["model"] not in shared.models and not shared.any_model:
        raise ValueError(f"the model {asked['model']!r:.80} is not offered here")
    outline = outline_of(str(asked["model"]))
    speed: str | None = SPEEDS[int(asked["speed"])]
    plan = None
    if asked["plan"] != BY_SLIDER:
        fitting = {each.name: each for each in _known(shared, outline) if each.fits}
        if asked["plan"] not in fitting:
            raise ValueError(f"the plan {asked['plan']!r:.80} does not fit this model; choose another")
        speed, plan = None, str(fitting[asked["plan"]].path)
    exact = speed == "exact"
    seed = int(asked["seed"] if asked["seed"] is not None else -1)
    path = output or shared.outputs.new()
    return GenerateRequest(
        prompt=prompt, negative_prompt=negative, output=path, model=str(asked["model"]), width=int(asked["width"]),
        height=int(asked["height"]), frames=int(asked["frames"]), steps=min(int(asked["steps"]), STEPS),
        guidance=float(asked["guidance"]), shift=float(asked["shift"]) if _shifted(outline, asked["shift"]) else None,
        seed=secrets.randbelow(2**31) if seed < 0 else seed, speed=speed, plan=plan, fps=FPS,
        cache="auto" if exact or asked["cache"] else "none",
        regions="easy" if asked["regions"] and not exact else "auto" if exact else "none",
        keep=shared.outputs.kept(path) if asked["keep"] else None, warm_up=not warm,
    )  # fmt: skip


def _shifted(outline: Outline, shift: float | None) -> bool:
    """Whether it is another shift than the model's own."""
    return shift is not None and outline.shift is not None and abs(shift - outline.shift) > 1e-6


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


def _sides(outline: Outline) -> list[int]:
    return list(outline.sides)


def _lengths(outline: Outline) -> list[tuple[str, int]]:
    return [(f"{count} frames · {count / FPS:.1f} s", count) for count in outline.lengths]


def _known(shared: Shared, outline: Outline) -> list[KnownPlan]:
    return known_plans(outline, shared.outputs.plans)


def _plans(shared: Shared, outline: Outline) -> tuple[list[tuple[str, str]], str]:
    """The choices, and as HTML the plans that do not fit, each with its reason."""
    known = _known(shared, outline)
    fitting = [(f"{each.name} ({each.words})" if each.words else each.name, each.name) for each in known if each.fits]
    rows = "".join(
        f"<li><b>{html.escape(each.name)}</b>: {html.escape(each.words)}</li>" for each in known if not each.fits
    )
    count = sum(not each.fits for each in known)
    noun = "plan does" if count == 1 else "plans do"
    unfit = f"<details class='unfit'><summary>{count} {noun} not fit</summary><ul>{rows}</ul></details>" if rows else ""
    return [("by the slider", BY_SLIDER), *fitting], unfit


def _for_model(shared: Shared, name: str) -> list[Any]:
    """The controls of what a model can make."""
    try:
        outline = outline_of(str(name))
    except ModelError:
        return [gr.skip()] * 8  # the prediction says what is wrong
    call, (plans, unfit) = outline.call, _plans(shared, outline)
    return [
        gr.Dropdown(_sides(outline), value=call["width"]), gr.Dropdown(_sides(outline), value=call["height"]),
        gr.Dropdown(_lengths(outline), value=call["num_frames"]), call["num_inference_steps"], call["guidance_scale"],
        gr.Slider(value=outline.shift or 1.0, interactive=outline.shift is not None),
        gr.Dropdown(plans, value=BY_SLIDER), unfit,
    ]  # fmt: skip


def _loaded(shared: Shared, facts: dict[str, Any] | None) -> list[Any]:
    """Values of the controls from the facts of a clip; what does not fit stays as it is."""
    if not facts:
        return [gr.skip()] * len(CONTROLS)
    try:
        outline = outline_of(str(facts["model"]))
    except (ModelError, KeyError):
        gr.Warning("The model of this clip is not on this machine; its other settings are loaded.")
        outline = outline_of("embedded")
    asked = facts.get("request") if isinstance(facts.get("request"), dict) else {}
    assert isinstance(asked, dict)
    stem = Path(str(asked.get("plan") or "")).stem
    fitting = {each.name for each in _known(shared, outline) if each.fits}
    plan = stem if stem in fitting else BY_SLIDER
    speed = asked.get("speed") if asked.get("speed") in SPEEDS else "balanced"

    def among(name: str, allowed: Sequence[int]) -> Any:
        return facts[name] if facts.get(name) in allowed else gr.skip()

    def number(value: Any, least: float, most: float) -> Any:
        return value if isinstance(value, int | float) and least <= value <= most else gr.skip()

    return [
        str(facts["prompt"])[:2000], str(facts.get("negative_prompt") or "")[:2000], outline.name,
        gr.Dropdown(_sides(outline), value=among("width", outline.sides)),
        gr.Dropdown(_sides(outline), value=among("height", outline.sides)),
        gr.Dropdown(_lengths(outline), value=among("frames", outline.lengths)),
        number(facts.get("steps"), 1, STEPS), number(facts.get("guidance"), 0, 15),
        number(asked.get("shift") or outline.shift, 0.1, 15), number(facts.get("seed"), 0, 2**31 - 1),
        SPEEDS.index(str(speed)), plan, asked.get("cache", "auto") != "none",
        asked.get("regions", "none") not in ("none", "auto", None), bool(facts.get("kept")),
    ]  # fmt: skip


def _offered(shared: Shared, path: str | None, model: str) -> Any:
    """A plan that another tab gives."""
    if not path:
        return gr.skip()
    try:
        plans, _ = _plans(shared, outline_of(model))
    except ValueError:
        return gr.skip()
    name = Path(path).stem
    return gr.Dropdown(plans, value=name if name in dict(map(reversed, plans)) else BY_SLIDER)  # type: ignore[arg-type]


def _connect_drop(drop: gr.File, shared: Shared) -> None:
    def dropped(file: str | None) -> Any:
        facts = None if not file else settings_of(Path(file))
        if file and facts is None:
            gr.Warning("This file carries no settings of Pointillist.")
        elif facts is not None:
            gr.Info("Settings loaded.")
        return gr.skip() if facts is None else facts

    drop.upload(dropped, drop, shared.settings, **QUIET)


def _connect_presets(controls: dict[str, Any], inputs: list[Any]) -> None:
    """Named settings in the browser."""
    kept = gr.BrowserState({}, storage_key="pointillist-presets", secret="pointillist")
    names = controls["preset"]
    without = ("prompt", "negative", "seed")

    def save(name: str, presets: dict[str, Any], *values: Any) -> tuple[Any, Any]:
        name = cleaned(name, "name")[:40]
        if not name:
            gr.Warning("Give the preset a name.")
            return gr.skip(), gr.skip()
        settings = {key: value for key, value in zip(CONTROLS, values, strict=True) if key not in without}
        presets = {**(presets or {}), name: settings}
        return presets, gr.Dropdown(list(presets), value=name)

    def use(name: str | None, presets: dict[str, Any]) -> list[Any]:
        settings = (presets or {}).get(name or "", {})
        return [settings.get(key, gr.skip()) for key in CONTROLS]

    def delete(name: str | None, presets: dict[str, Any]) -> tuple[Any, Any]:
        left = {key: value for key, value in (presets or {}).items() if key != name}
        return left, gr.Dropdown(list(left), value=None)

    controls["preset-save"].click(save, [controls["preset-name"], kept, *inputs], [kept, names], **QUIET)
    controls["preset-delete"].click(delete, [names, kept], [kept, names], **QUIET)
    names.input(use, [names, kept], inputs, **QUIET)
    gr.on(None, lambda presets: gr.Dropdown(list(presets or {})), kept, names, **QUIET)


def _learn(predictor: Predictor, shared: Shared) -> None:
    """From the latest clips, so that the first prediction is a good one."""
    latest = [facts for path in shared.outputs.clips[:5] if (facts := settings_of(path))]
    predictor.learn_all(reversed(latest))
