"""What the tabs have in common."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from pointillist.pipelines.outputs import Outputs


@dataclass(frozen=True)
class Shared:
    """By these the tabs speak to each other. A tab writes into one as an output of its event; others listen to it."""

    page: gr.Blocks
    """For `page.load`."""
    tabs: gr.Tabs
    """As an output, `gr.Tabs(selected="generate")` goes there."""
    here: gr.Tab
    """The tab that is drawn. For `here.select`: it was opened."""
    outputs: Outputs
    """The finished clips."""
    clip: gr.BrowserState
    """The name in `outputs` of the clip in hand: that was last generated, or chosen in the gallery. "" is none. It
    survives a reload. Read it as an input when a tab is selected; listen to `clip.change`."""
    settings: gr.State
    """A dict of `generate`'s facts: what is written here, Generate puts into its controls. None is nothing."""
    plan: gr.State
    """The path of a plan file: what is written here, Generate adds to its list of plans, and chooses."""
    models: tuple[str, ...] = ()
    """Folders and Hub ids that whoever started the page offers, beside those in the Hub's cache."""
    any_model: bool = False
    """Whether any folder may be named: only where the page is for this machine alone."""
    remote: str = ""
    """The URL of a server that clips may be asked of; "" is none. Whoever starts the page names it, nobody else."""
