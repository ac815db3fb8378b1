"""Remote: a clip from a server that speaks `/v1/videos`, so that a laptop drives a machine with a GPU."""

from __future__ import annotations

import math
import secrets
from html import escape
from typing import Any

import gradio as gr

from pointillist.pipelines.engine import Engine, Job
from pointillist.pipelines.generate import GenerateRequest
from pointillist.pipelines.remote import RemoteRequest, Server, check_can_be_sent
from pointillist.web.job_panel import JobPanel, duration
from pointillist.web.limits import STEPS, cleaned
from pointillist.web.shared import Shared

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    name = Server(shared.remote).name
    gr.HTML(
        f"<div>Clips are made by <b>{escape(name)}</b>: its model, and its own ways to be fast. They land in the "
        "gallery of this machine. What is empty or 0, the server chooses.</div>"
    )
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(label="Prompt", lines=3, max_lines=8, max_length=2000, elem_id="remote-prompt")
            negative = gr.Textbox(label="Negative prompt", max_length=2000, elem_id="remote-negative")
            with gr.Row():
                width = _number("Width", "remote-width")
                height = _number("Height", "remote-height")
                frames = _number("Frames", "remote-frames")
                fps = _number("FPS", "remote-fps", 16)
            with gr.Row():
                steps = _number("Steps", "remote-steps")
                guidance = _number("Guidance", "remote-guidance")
                shift = _number("Shift", "remote-shift")
                seed = _number("Seed (-1: any)", "remote-seed", -1)
            start = gr.Button("Generate there", variant="primary", size="lg", elem_id="remote-start")
        with gr.Column(scale=6, min_width=320):
            place = gr.Column()
            video = gr.Video(
                label="Clip", elem_id="remote-video", autoplay=True, loop=True, interactive=False, height=420,
                buttons=["download"],
            )  # fmt: skip
            details = gr.HTML("", elem_id="remote-details")

    def finished(job: Job) -> list[Any]:
        facts, path = job.result().facts, job.result().output
        there = facts["remote"]["seconds"]
        words = f"{facts['width']}×{facts['height']}, {facts['frames']} frames, by {facts['model']} at {name}, in "
        words += duration(facts["seconds"]["total"]) + (f" ({duration(there)} of work there)" if there else "")
        return [str(path), f"<div>{escape(words)}, seed {facts['seed']}.</div>", path.name]

    with place:
        panel = JobPanel(engine, shared, "remote", finished, [video, details, shared.clip])

    def begin(prompt: str, negative: str, *numbers: Any) -> list[Any]:
        try:
            width, height, frames, fps, steps, guidance, shift, seed = numbers
            request = GenerateRequest(
                prompt=cleaned(prompt), negative_prompt=cleaned(negative, "negative prompt"),
                output=shared.outputs.new(), width=_whole("width", width), height=_whole("height", height),
                frames=_whole("frames", frames), fps=_whole("frames per second", fps) or 16,
                steps=_whole("steps", steps, STEPS), guidance=guidance or None, shift=shift or None,
                seed=int(seed) if seed is not None and seed >= 0 else secrets.randbelow(2**31),
            )  # fmt: skip
            check_can_be_sent(request)
            return panel.begin(engine.submit(RemoteRequest(shared.remote, request)))
        except (ValueError, OSError) as error:
            return panel.refuse(str(error))

    asked = [prompt, negative, width, height, frames, fps, steps, guidance, shift, seed]
    start.click(begin, asked, panel.begun, **QUIET)


def _number(label: str, elem_id: str, value: float | None = None) -> gr.Number:
    return gr.Number(value, label=label, elem_id=elem_id, min_width=90)


def _whole(name: str, value: float | None, most: int = 8192) -> int | None:
    """None for an empty field, which comes as 0. Raises ValueError for what is no whole number, or too large."""
    if not value:
        return None
    if not math.isfinite(value) or value != int(value) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value:g}; it must be a whole number from 1 to {most}")
    return int(value)
