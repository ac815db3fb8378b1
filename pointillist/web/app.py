"""The page: a tab for each file beside this one.

A tab is a module with one function, called once while the page is drawn, inside its `gr.Tab`:

    def tab(engine: Engine, shared: Shared) -> None:
        \"\"\"Draw the tab, and connect its events.\"\"\"

- It draws its components, and gives each that a test or a screenshot needs an `elem_id` that begins with the tab's.
- It starts work only by `engine.submit(request, previews=True)`, and shows it by a `JobPanel` of its own.
- It speaks to other tabs by the components in `shared`, never by importing them.
- What is served are files of `shared.outputs` alone, named by it. Text of a user goes through `html.escape` before it
  goes into `gr.HTML`. Handlers have `api_visibility="private"`.
- A module may have a constant `CSS`, which `TABS` collects; use the theme's variables (`var(--body-text-color)`,
  `var(--block-border-color)`, `var(--primary-500)` …), so that it is right in light and dark.
"""

from __future__ import annotations

from types import ModuleType

import gradio as gr

from pointillist.pipelines.engine import Engine
from pointillist.pipelines.outputs import Outputs
from pointillist.web import generate, inspect, repaint, search
from pointillist.web.shared import Shared
from pointillist.web.style import CSS

TABS: tuple[tuple[str, str, ModuleType], ...] = (
    ("generate", "Generate", generate),
    ("inspect", "Inspect", inspect),
    ("search", "Search", search),
    ("repaint", "Repaint", repaint),
)
"""Id, title and module of every tab, in their order."""


def build(engine: Engine, outputs: Outputs) -> gr.Blocks:
    """The page. `css()` is given to its launch."""
    with gr.Blocks(title="Pointillist", analytics_enabled=False, fill_width=True) as page:
        clip = gr.BrowserState("", storage_key="pointillist-clip", secret="pointillist")
        settings, plan = gr.State(None), gr.State(None)
        with gr.Tabs(elem_id="tabs") as tabs:
            shared = Shared(page, tabs, outputs, clip, settings, plan)
            for name, title, module in TABS:
                with gr.Tab(title, id=name, elem_id=f"tab-{name}"):
                    module.tab(engine, shared)
    return page


def css() -> str:
    """Of the page and of all tabs."""
    return "\n".join([CSS, *(getattr(module, "CSS", "") for _, _, module in TABS)])
