"""Serving the page: to this machine alone, unless there is a password."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any

from pointillist.pipelines.remote import Server
from pointillist.web.limits import QUEUE, UPLOAD

USER = "pointillist"
REQUESTS = 64
"""Requests of pages that may wait; others are told to try again."""
SHORTEST = 8
"""Characters of a password."""


def is_this_machine(host: str) -> bool:
    """Whether only this machine can reach a page that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_password(host: str, password: str | None) -> None:
    """Raises ValueError where others could come in without one."""
    if password is None and not is_this_machine(host):
        raise ValueError(
            f"--host {host} lets other machines in, so a password is needed: set POINTILLIST_PASSWORD, or leave --host "
            "out and forward the port, e.g. with ssh -L 7860:localhost:7860"
        )
    if password is not None and len(password) < SHORTEST:
        raise ValueError(f"the password has {len(password)} characters; it must have at least {SHORTEST}")


def serve(
    host: str,
    port: int,
    folder: Path,
    password: str | None = None,
    models: tuple[str, ...] = (),
    remote: str = "",
    **more: Any,
) -> Any:
    """Serve the page until it is interrupted; with `prevent_thread_lock=True`, return it and its engine at once.

    Raises:
        ValueError: others could come in without a password.
        OSError: the folder cannot be written, or the port is taken.
    """
    check_password(host, password)
    if remote:
        Server(remote)  # what is no server is told at once
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio as gr

    from pointillist.pipelines.engine import Engine
    from pointillist.pipelines.outputs import Outputs
    from pointillist.pipelines.video import check_output
    from pointillist.web.app import build, css

    outputs = Outputs(folder.absolute())
    check_output(outputs.folder / "x.mp4")
    engine = Engine(queue=QUEUE)
    page = build(engine, outputs, models, any_model=is_this_machine(host), server=remote)
    page.queue(default_concurrency_limit=16, max_size=REQUESTS, api_open=False)
    try:
        page.launch(
            server_name=host, server_port=port, allowed_paths=[str(outputs.folder)], max_file_size=UPLOAD,
            auth=None if password is None else (USER, password), css=css(), theme=theme(gr), share=False,
            enable_monitoring=False, strict_cors=True, run_history=False, mcp_server=False, ssr_mode=False,
            pwa=False, footer_links=[], show_error=False, **more,
        )  # fmt: skip
    finally:
        if not more.get("prevent_thread_lock"):
            engine.close()
    return page, engine


def theme(gr: Any) -> Any:
    """With the fonts of the system: nothing is fetched from elsewhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return gr.themes.Default(
        primary_hue="orange", neutral_hue="slate", radius_size="md", spacing_size="sm", font=fonts,
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )  # fmt: skip
