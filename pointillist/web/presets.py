"""Settings that come from a file that is dropped, or from names in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from pointillist.web.controls import CONTROLS
from pointillist.web.limits import cleaned
from pointillist.web.settings import settings_of
from pointillist.web.shared import Shared

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def connect_drop(drop: gr.File, shared: Shared) -> None:
    def dropped(file: str | None) -> Any:
        facts = None if not file else settings_of(Path(file))
        if file and facts is None:
            gr.Warning("This file carries no settings of Pointillist.")
        elif facts is not None:
            gr.Info("Settings loaded.")
        return gr.skip() if facts is None else facts

    drop.upload(dropped, drop, shared.settings, **QUIET)


def connect_presets(controls: dict[str, Any], inputs: list[Any]) -> None:
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
