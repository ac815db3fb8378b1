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
from pointillist.web import compare, gallery, generate, inspect, remote, repaint, search, system
from pointillist.web.shared import Shared
from pointillist.web.style import CSS

TABS: tuple[tuple[str, str, ModuleType], ...] = (
    ("generate", "Generate", generate),
    ("compare", "Compare", compare),
    ("inspect", "Inspect", inspect),
    ("search", "Search", search),
    ("repaint", "Repaint", repaint),
    ("gallery", "Gallery", gallery),
    ("system", "System", system),
)
"""Id, title and module of every tab, in their order."""
REMOTE: tuple[tuple[str, str, ModuleType], ...] = (("remote", "Remote", remote),)
"""Where a server is named, behind the first."""


def build(
    engine: Engine, outputs: Outputs, models: tuple[str, ...] = (), any_model: bool = False, server: str = ""
) -> gr.Blocks:
    """The page. `css()` is given to its launch. For `models` and `any_model` see `Shared`; `server` is its `remote`."""
    with gr.Blocks(title="Pointillist", analytics_enabled=False, fill_width=True) as page:
        clip = gr.BrowserState("", storage_key="pointillist-clip", secret="pointillist")
        settings, plan = gr.State(None), gr.State(None)
        gr.HTML('<div class="banner"><b>Pointillist</b><span>video, accelerated: see what is computed</span></div>')
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
            for name, title, module in TABS[:1] + REMOTE * bool(server) + TABS[1:]:
                with gr.Tab(title, id=name, elem_id=f"tab-{name}", render_children=True) as here:
                    module.tab(
                        engine, Shared(page, tabs, here, outputs, clip, settings, plan, models, any_model, server)
                    )
    return page


def css() -> str:
    """Of the page and of all tabs."""
    return "\n".join([CSS, *(getattr(module, "CSS", "") for _, _, module in TABS)])
