"""Serving the page: to this machine alone, unless there is a password."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

UPLOAD = "64mb"
"""The largest file that may be sent."""


def serve(host: str, port: int, folder: Path, password: str | None, **more: Any) -> Any:
    """Serve the page until it is interrupted."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    from pointillist.pipelines.engine import Engine
    from pointillist.pipelines.outputs import Outputs
    from pointillist.web.app import build, css

    outputs = Outputs(folder.absolute())
    outputs.folder.mkdir(parents=True, exist_ok=True)
    with Engine() as engine:
        page = build(engine, outputs)
        page.queue(default_concurrency_limit=16, max_size=64, api_open=False)
        page.launch(
            server_name=host, server_port=port, allowed_paths=[str(outputs.folder)], max_file_size=UPLOAD,
            auth=None if password is None else ("pointillist", password), css=css(), theme=gr.themes.Soft(),
            enable_monitoring=False, strict_cors=True, run_history=False, mcp_server=False, ssr_mode=False,
            footer_links=[], share=False, **more,
        )  # fmt: skip
