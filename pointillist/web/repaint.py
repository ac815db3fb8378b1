"""Repaint: a region of a finished clip anew, with another prompt."""

from __future__ import annotations

import tempfile
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from pointillist.pipelines.again import facts_of
from pointillist.pipelines.engine import Engine, Job
from pointillist.pipelines.mask import save_mask
from pointillist.pipelines.repaint import Prediction, RepaintRequest, predict
from pointillist.pipelines.video import OutputError, read_frames
from pointillist.web.job_panel import JobPanel, duration, failure
from pointillist.web.limits import cleaned
from pointillist.web.shared import Shared

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
BRUSHES: list[str | tuple[str, float]] = [("#ffffff", 0.65), ("#f97316", 0.65)]

CSS = """
.repaint-cost { font-size: var(--text-md); }
.repaint-cost b { font-variant-numeric: tabular-nums; }
"""


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    note = gr.HTML(elem_id="repaint-note")
    with gr.Row():
        with gr.Column(min_width=320):
            editor = gr.ImageEditor(
                type="numpy", image_mode="RGBA", label="Draw over what is to change", sources=(), transforms=(),
                layers=False, brush=gr.Brush(20, BRUSHES, BRUSHES[0], "fixed"),
                elem_id="repaint-editor", height=420, interactive=True, format="png",
            )  # fmt: skip
            frame = gr.Slider(0, 1, 0, step=1, label="Frame to draw on", elem_id="repaint-frame", visible=False,
                              info="What is drawn holds for all frames.")  # fmt: skip
            with gr.Accordion("A rectangle instead", open=False):
                rectangle = gr.Textbox(
                    label="x,y,width,height in pixels, or x,y,width,height,first-last with frames from 0",
                    placeholder="40,60,80,80,0-16", elem_id="repaint-rectangle",
                )  # fmt: skip
        with gr.Column(min_width=320):
            prompt = gr.Textbox(label="What the new clip shows, all of it", lines=2, elem_id="repaint-prompt")
            strength = gr.Slider(0.05, 1, 0.7, step=0.05, label="Strength", elem_id="repaint-strength",
                                 info="The share of the steps that are redone; less keeps the layout.")  # fmt: skip
            refresh = gr.Slider(1, 20, 5, step=1, label="Refresh", elem_id="repaint-refresh",
                                info="Every so many of these steps compute all tokens.")  # fmt: skip
            cost = gr.HTML(elem_id="repaint-cost")
            start = gr.Button("Repaint", variant="primary", elem_id="repaint-start")
            video = gr.Video(label="Repainted", elem_id="repaint-video", autoplay=True, loop=True, visible=False)
            panel_place = gr.Column()
            result = gr.HTML(elem_id="repaint-result")

    def request(name: str, drawn: Any, text: str | None, prompt: str, strength: float, refresh: float, output: Path,
                mask: Path) -> RepaintRequest:  # fmt: skip
        """Raises ValueError and OSError."""
        clip = _clip(shared, name)
        area = (text or "").strip()
        if not area:
            save_mask(_mask(drawn), mask)
        return RepaintRequest(
            clip, area or str(mask), prompt, output, float(strength), int(refresh),
            keep=shared.outputs.kept(output),
        )  # fmt: skip

    def predicted(name: str, drawn: Any, text: str | None, strength: float, refresh: float) -> str:
        if not (text or "").strip() and not _is_drawn(drawn):
            return '<div class="repaint-cost">Draw over a region to see what it will take.</div>'
        try:
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                asked = request(name, drawn, text, "any", strength, refresh, place / "a.mp4", place / "mask.png")
                return _words(predict(asked))
        except (ValueError, OSError) as error:
            return failure(str(error))

    def opened(name: str) -> list[Any]:
        """Another clip."""
        try:
            clip = _clip(shared, name)
            facts = facts_of(clip)
            middle = facts["frames"] // 2
            return [
                f"<div>Of the clip “{escape(facts['prompt'])}”.</div>", _background(clip, middle),
                gr.Slider(0, facts["frames"] - 1, middle, visible=True), facts["prompt"], "",
            ]  # fmt: skip
        except (ValueError, OSError) as error:
            return [f"<div>{escape(str(error))}</div>", None, gr.Slider(visible=False), gr.skip(), ""]

    def turned(name: str, number: float, drawn: Any) -> Any:
        """Another frame below what is drawn."""
        try:
            clip = _clip(shared, name)
        except OutputError:
            return gr.skip()
        return {**_background(clip, int(number)), "layers": (drawn or {}).get("layers", [])}

    def finished(job: Job) -> list[Any]:
        facts, path = job.result().facts, job.result().output
        took = facts["seconds"]["total"]
        words = (
            f"{facts['computed']:.0%} of a whole generation's tokens were computed, in {duration(took)}. Outside of "
            "the region every pixel is as it was."
        )
        return [gr.Video(str(path), visible=True), f"<div>{escape(words)}</div>", path.name]

    with panel_place:
        panel = JobPanel(engine, shared, "repaint", finished, [video, result, shared.clip])

    def begin(name: str, drawn: Any, text: str | None, prompt: str, strength: float, refresh: float) -> list[Any]:
        try:
            output = shared.outputs.new()
            mask = output.with_name(f"{output.stem}_mask.png")
            asked = request(name, drawn, text, cleaned(prompt), strength, refresh, output, mask)
            return panel.begin(engine.submit(asked, previews=True))
        except (ValueError, OSError) as error:
            return panel.refuse(str(error))

    drawn, how = [shared.clip, editor, rectangle], [strength, refresh]
    for event in (shared.clip.change, shared.page.load):
        event(opened, shared.clip, [note, editor, frame, prompt, rectangle], **QUIET)
    frame.release(turned, [shared.clip, frame, editor], editor, **QUIET)
    # after a reload the editor tells of the first stroke as input alone
    for change in (editor.change, editor.input, rectangle.change, strength.release, refresh.release):
        change(predicted, [*drawn, *how], cost, trigger_mode="always_last", **QUIET)
    start.click(begin, [*drawn, prompt, *how], panel.begun, **QUIET)


def _clip(shared: Shared, name: str) -> Path:
    """Raises OutputError if no clip is in hand."""
    clip = shared.outputs.path(name or "")
    if clip is None:
        raise OutputError("no clip is in hand: generate one, or choose one in the gallery")
    return clip


def _background(clip: Path, number: int) -> dict[str, Any]:
    """A frame, as the editor takes it."""
    return {"background": read_frames(clip, [number])[0], "layers": [], "composite": None}


def _is_drawn(drawn: Any) -> bool:
    return bool(drawn) and any(layer is not None and layer[..., 3].any() for layer in drawn.get("layers") or [])


def _mask(drawn: Any) -> np.ndarray:
    """bool [height, width]: where anything was drawn. Raises ValueError."""
    if not _is_drawn(drawn):
        raise ValueError("nothing is drawn; draw over the region that is to change, or give a rectangle")
    mask: np.ndarray = np.any([layer[..., 3] > 0 for layer in drawn["layers"]], axis=0)
    return mask


def _words(cost: Prediction) -> str:
    again = f", of which {duration(cost.again)} make the clip again: nothing was kept of it" if cost.again else ""
    return (
        f'<div class="repaint-cost">{cost.area:.1%} of the pixels, <b>{cost.computed:.0%}</b> of a whole generation’s '
        f"tokens: about <b>{duration(cost.seconds)}</b>{again}.</div>"
    )
