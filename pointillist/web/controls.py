"""The controls of Generate: drawn, read into a request, and filled from a clip, a model or a plan."""

from __future__ import annotations

import html
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pointillist.pipelines.generate import SPEEDS, GenerateRequest
from pointillist.pipelines.known_plans import KnownPlan, known_plans
from pointillist.pipelines.load import ModelError
from pointillist.pipelines.outline import Outline, models_here, outline_of
from pointillist.web.limits import STEPS, cleaned
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
CONTROLS = (
    "prompt", "negative", "model", "width", "height", "frames", "steps", "guidance", "shift", "seed", "speed", "plan",
    "cache", "regions", "keep",
)  # fmt: skip
"""In the order of the handlers' arguments."""


def draw(shared: Shared, first: Outline) -> dict[str, Any]:
    """Draw them; by name. Beside those of `CONTROLS` some that act on them."""
    call = first.call
    made: dict[str, Any] = {}
    made["model"] = gr.Dropdown(
        list(dict.fromkeys([*models_here(), *shared.models])), value="embedded", label="Model",
        elem_id="generate-model", allow_custom_value=shared.any_model,
        info="embedded, or what is on this machine" + (": a Hub id or a folder" if shared.any_model else ""),
    )  # fmt: skip
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
            _lengths(first), value=call["num_frames"], label="Length", elem_id="generate-frames", min_width=150, scale=2
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
        made["dice"] = gr.Button("Random", size="sm", elem_id="generate-dice", scale=1, min_width=70)
        made["again"] = gr.Button("Last", size="sm", elem_id="generate-again", scale=1, min_width=70)
    with gr.Group():
        made["speed"] = gr.Slider(
            0,
            len(SPEEDS) - 1,
            2,
            step=1,
            label="Speed",
            elem_id="generate-speed",
            buttons=[],
            info="Less of the attention is computed towards the right",
        )
        names = "".join(f"<span>{each}</span>" for each in SPEEDS)
        gr.HTML(f'<div class="speeds">{names}</div>', padding=True, elem_classes="in-group")
        plans, unfit = _plans(shared, first)
        made["plan"] = gr.Dropdown(plans, value=BY_SLIDER, label="Plan", elem_id="generate-plan")
        made["unfit"] = gr.HTML(unfit, visible=bool(unfit), elem_id="generate-unfit", elem_classes="in-group")
        with gr.Row():
            made["cache"] = gr.Checkbox(
                True, label="Reuse steps", info="as the plan says", elem_id="generate-cache", min_width=120
            )
            made["regions"] = gr.Checkbox(
                False, label="Regions", info="in place of reused steps", elem_id="generate-regions", min_width=120
            )
    with gr.Accordion("Advanced", open=False, elem_id="generate-advanced"):
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


def request_of(shared: Shared, asked: dict[str, Any], warm: bool, output: Path | None = None) -> GenerateRequest:
    """What the controls say. Raises ValueError, and NoRoom for a full disk."""
    prompt, negative = cleaned(asked["prompt"]), cleaned(asked["negative"], "negative prompt")
    outline = offered_model(shared, asked["model"])
    for name, legal in (("width", outline.sides), ("height", outline.sides), ("frames", outline.lengths)):
        if asked[name] not in legal:
            raise ValueError(f"{name} {asked[name]!r:.20} is not possible; choose one from the list")
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
        guidance=float(asked["guidance"]), shift=asked["shift"] if _another_shift(outline, asked["shift"]) else None,
        seed=secrets.randbelow(2**31) if seed < 0 else seed, speed=speed, plan=plan, fps=FPS,
        cache="auto" if exact or asked["cache"] else "none",
        regions="easy" if asked["regions"] and not exact else "auto",
        keep=shared.outputs.kept(path) if asked["keep"] else None, warm_up=not warm,
    )  # fmt: skip


def offered_model(shared: Shared, name: Any) -> Outline:
    """Raises ModelError for a model that is not offered here: folders may be named on this machine alone."""
    if not shared.any_model and name not in models_here() and name not in shared.models:
        raise ModelError(f"the model {str(name)!r:.80} is not offered here; choose one from the list")
    return outline_of(str(name))


def _another_shift(outline: Outline, shift: float | None) -> bool:
    """Whether it is another shift than the model's own."""
    return shift is not None and outline.shift is not None and abs(shift - outline.shift) > 1e-6


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


def for_model(shared: Shared, name: str) -> list[Any]:
    """The controls of what a model can make."""
    try:
        outline = offered_model(shared, name)
    except ModelError:
        return [gr.skip()] * 8  # the prediction says what is wrong
    call, (plans, unfit) = outline.call, _plans(shared, outline)
    return [
        gr.Dropdown(_sides(outline), value=call["width"]), gr.Dropdown(_sides(outline), value=call["height"]),
        gr.Dropdown(_lengths(outline), value=call["num_frames"]), call["num_inference_steps"], call["guidance_scale"],
        gr.Slider(value=outline.shift or 1.0, interactive=outline.shift is not None),
        gr.Dropdown(plans, value=BY_SLIDER), gr.HTML(unfit, visible=bool(unfit)),
    ]  # fmt: skip


def loaded(shared: Shared, facts: dict[str, Any] | None) -> list[Any]:
    """Values of the controls from the facts of a clip; what does not fit stays as it is."""
    if not facts:
        return [gr.skip()] * len(CONTROLS)
    try:
        outline = offered_model(shared, facts["model"])
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


def offered(shared: Shared, path: str | None, model: str) -> Any:
    """A plan that another tab gives."""
    if not path:
        return gr.skip()
    try:
        plans, _ = _plans(shared, offered_model(shared, model))
    except ValueError:
        return gr.skip()
    name = Path(path).stem
    return gr.Dropdown(plans, value=name if name in dict(map(reversed, plans)) else BY_SLIDER)  # type: ignore[arg-type]
