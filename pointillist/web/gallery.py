"""Gallery: every finished clip with its settings, which go back into Generate by a click."""

from __future__ import annotations

import html
import time
from pathlib import Path
from typing import Any

import gradio as gr

from pointillist.pipelines.engine import Engine
from pointillist.web.files import address
from pointillist.web.settings import chips, notes, settings_of, timeline
from pointillist.web.shared import Shared

PAGE = 24
"""Clips that are shown at first, and more by each click."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .7rem; }
.card { text-align: left; padding: 0; font-weight: 400; border-radius: 8px; cursor: pointer;
  border: 1px solid var(--block-border-color); overflow: hidden; background: var(--background-fill-secondary);
  color: var(--body-text-color); }
.card:hover, .card:focus-visible { border-color: var(--primary-500); outline: none; }
.card video, .card img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; margin: 0; }
.card p { margin: 0; padding: .35rem .5rem 0; font-size: .8rem; display: -webkit-box; -webkit-line-clamp: 2;
  -webkit-box-orient: vertical; overflow: hidden; }
.card small { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  padding: 0 .5rem .4rem; color: var(--body-text-color-subdued); }
.empty { padding: 2rem; text-align: center; color: var(--body-text-color-subdued); }
"""
CHOOSE = """
const card = (event) => event.target.closest('.card');
element.addEventListener('click', (event) => { if (card(event)) trigger('select', {name: card(event).dataset.name}); });
const film = (event) => card(event)?.querySelector('video');
element.addEventListener('mouseover', (event) => film(event)?.play());
element.addEventListener('mouseout', (event) => film(event)?.pause());
"""


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    count = gr.State(PAGE)
    chosen = gr.State("")
    with gr.Row():
        with gr.Column(scale=6, min_width=320):
            cards = gr.HTML("", elem_id="gallery-cards", js_on_load=CHOOSE)
            more = gr.Button("Show more", size="sm", visible=False)
        with gr.Column(scale=5, min_width=320, visible=False) as side:
            video = gr.Video(
                label="Clip", autoplay=True, loop=True, interactive=False, height=400, elem_id="gallery-video",
                buttons=["download"],
            )  # fmt: skip
            picture = gr.Image(label="Clip", visible=False, interactive=False, type="filepath", height=400)
            words = gr.HTML("", elem_id="gallery-details")
            with gr.Row():
                load = gr.Button("Load settings", variant="primary", size="sm", elem_id="gallery-load", min_width=110)
                compare = gr.Button("Compare", size="sm", elem_id="gallery-compare", min_width=90)
                inspect = gr.Button("Inspect", size="sm", elem_id="gallery-inspect", min_width=90)
                repaint = gr.Button("Repaint", size="sm", elem_id="gallery-repaint", min_width=90)
                delete = gr.Button("Delete", size="sm", variant="stop", elem_id="gallery-delete", min_width=90)
            with gr.Accordion("Settings", open=False):
                used = gr.JSON(show_label=False)

    def fill(most: int) -> list[Any]:
        clips = shared.outputs.clips
        return [_cards(clips[:most]), gr.Button(visible=len(clips) > most)]

    def choose(event: gr.EventData) -> list[Any]:
        path = shared.outputs.path(str(getattr(event, "name", "")))
        if path is None:
            return [""] + [gr.skip()] * 5
        facts, film = settings_of(path) or {}, path.suffix == ".mp4"
        return [
            path.name, gr.Column(visible=True), gr.Video(str(path) if film else None, visible=film),
            gr.Image(None if film else str(path), visible=not film),
            _words(facts), facts,
        ]  # fmt: skip

    def remove(name: str, most: int) -> list[Any]:
        shared.outputs.delete(name)
        return ["", gr.Column(visible=not name), *fill(most)]

    def settings(name: str) -> list[Any]:
        path = shared.outputs.path(name)
        facts = None if path is None else settings_of(path)
        return [facts or gr.skip(), gr.Tabs(selected="generate") if facts else gr.skip()]

    shown = [cards, more]
    shared.here.select(fill, count, shown, **QUIET)
    shared.clip.change(fill, count, shown, **QUIET)
    more.click(lambda most: most + PAGE, count, count, **QUIET).then(fill, count, shown, **QUIET)
    cards.select(choose, None, [chosen, side, video, picture, words, used], **QUIET)
    load.click(settings, chosen, [shared.settings, shared.tabs], **QUIET)
    for button, there in ((compare, "compare"), (inspect, "inspect"), (repaint, "repaint")):
        button.click(
            lambda name, there=there: [name, gr.Tabs(selected=there)], chosen, [shared.clip, shared.tabs], **QUIET
        )
    really = "(name, most) => [confirm('Delete this clip and what is beside it?') ? name : '', most]"
    delete.click(remove, [chosen, count], [chosen, side, *shown], js=really, **QUIET)


def _words(facts: dict[str, Any]) -> str:
    prompt = html.escape(str(facts.get("prompt", "")))
    return f"<p>{prompt}</p>{chips(facts)}{timeline(facts.get('kinds') or ())}{notes(facts)}"


def _cards(clips: list[Path]) -> str:
    if not clips:
        return '<div class="empty">Nothing yet. What you generate is kept here, with its settings.</div>'
    return f'<div class="cards">{"".join(map(_card, clips))}</div>'


def _card(path: Path) -> str:
    facts, source = settings_of(path) or {}, html.escape(address(path))
    picture = f'<img loading="lazy" alt="" src="{source}">'
    if path.suffix == ".mp4":
        picture = f'<video muted loop playsinline preload="metadata" src="{source}"></video>'
    seconds = facts.get("seconds", {}).get("total") if isinstance(facts.get("seconds"), dict) else None
    about = [_when(path), *([f"{seconds:.1f} s"] if isinstance(seconds, int | float) else [])]
    prompt = html.escape(str(facts.get("prompt", "no settings"))[:200])
    return (
        f'<button class="card" data-name="{html.escape(path.name)}" aria-label="{prompt}">{picture}<p>{prompt}</p>'
        f"<small>{' · '.join(about)}</small></button>"
    )


def _when(path: Path) -> str:
    try:
        return time.strftime("%d %b %H:%M", time.strptime(path.name[:15], "%Y%m%d-%H%M%S"))
    except ValueError:
        return ""
