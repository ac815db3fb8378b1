"""System: the machine, the backend and why it, versions, memory."""

from __future__ import annotations

import html
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gradio as gr

from pointillist.pipelines.engine import Engine
from pointillist.pipelines.environment import describe
from pointillist.pipelines.generate import GenerateRequest
from pointillist.web.limits import QUEUE
from pointillist.web.shared import Shared

CSS = """
.facts { width: 100%; border-collapse: collapse; font-size: .9rem; }
.facts th { text-align: left; padding: .9rem .4rem .3rem; font-weight: 600; }
.facts, .facts tr, .facts th, .facts td { border: 0 !important; }
.facts td { padding: .25rem .4rem; border-top: 1px solid var(--block-border-color) !important; vertical-align: top;
  overflow-wrap: anywhere; }
.facts td:first-child { width: 11rem; color: var(--body-text-color-subdued); }
@media (max-width: 600px) { .facts td:first-child { width: 7rem; } }
"""


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    table = gr.HTML("", elem_id="system-facts", padding=True)
    with gr.Accordion("As JSON, for a report of a problem", open=False):
        raw = gr.JSON(show_label=False, elem_id="system-json")

    def look() -> list[Any]:
        facts = describe()
        return [_table(facts, engine, shared), facts]

    shared.here.select(look, None, [table, raw], show_progress="hidden", api_visibility="private")


def _table(facts: dict[str, Any], engine: Engine, shared: Shared) -> str:
    machine, backend = facts["machine"], facts["backend"]
    disk = shutil.disk_usage(shared.outputs.folder)
    running = engine.running
    now = "nothing"
    if running is not None:
        now = running.request.prompt if isinstance(running.request, GenerateRequest) else type(running.request).__name__
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in machine["gpus"]] or ["none"]
    parts = {
        "Machine": [
            ("System", machine["system"]), ("Processor", machine["processor"]), ("Cores", machine["cores"]),
            ("GPU", "; ".join(gpus)),
        ],
        "Attention": [
            ("Backend", backend["chosen"]), ("Why", backend["reason"]),
            *((f"Not {name}", why) for name, why in backend["unavailable"].items()),
        ],
        "Memory": [
            ("Machine", f"{machine['memory_gib']} GiB, {_available()} available"), ("This program", _resident()),
            *_gpu_memory(),
            ("Disk", f"{_gib(disk.free)} of {_gib(disk.total)} free; outputs take {_gib(shared.outputs.used)}"),
        ],
        "Engine": [
            ("Now", now), ("Waiting", f"{len(engine.waiting)} of {QUEUE} that may"),
            ("Outputs", str(shared.outputs.folder)),
        ],
        "Versions": [("pointillist", facts["pointillist"]), ("Python", facts["python"]), *facts["packages"].items()],
    }  # fmt: skip
    return f'<table class="facts">{"".join(_rows(title, rows) for title, rows in parts.items())}</table>'


def _rows(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    words = ((str(name), "not installed" if value is None else str(value)) for name, value in rows)
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in words)
    return f'<tr><th colspan="2">{title}</th></tr>{"".join(cells)}'


def _available() -> str:
    try:
        return _gib(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return "an unknown part"


def _resident() -> str:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return "unknown"
    return _gib(pages * os.sysconf("SC_PAGE_SIZE"))


def _gpu_memory() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        return []
    free, total = torch.cuda.mem_get_info()
    return [("GPU", f"{_gib(free)} of {_gib(total)} free")]


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
