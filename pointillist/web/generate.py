"""Generate: from a prompt to a clip."""

from __future__ import annotations

from typing import Any

import gradio as gr

from pointillist.pipelines.engine import Engine, Job
from pointillist.pipelines.generate import GenerateRequest
from pointillist.web.job_panel import JobPanel
from pointillist.web.shared import Shared


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    prompt = gr.Textbox(label="Prompt", value="a red circle moving left on black", lines=2, elem_id="generate-prompt")
    button = gr.Button("Generate", variant="primary", elem_id="generate-start")

    def finished(job: Job) -> list[Any]:
        result = job.result()
        return [str(result.output), result.output.name]

    panel_place = gr.Column()
    video = gr.Video(label="Clip", elem_id="generate-video", autoplay=True, loop=True)
    with panel_place:
        panel = JobPanel(engine, shared, "generate", finished, [video, shared.clip])

    def start(text: str) -> list[Any]:
        try:
            request = GenerateRequest(prompt=text, output=shared.outputs.new(), width=64, height=64, frames=17)
            return panel.begin(engine.submit(request, previews=True))
        except (ValueError, OSError) as error:
            return panel.refuse(str(error))

    button.click(start, prompt, panel.begun, show_progress="hidden", api_visibility="private")
