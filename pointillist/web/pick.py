"""HTML of which parts can be clicked: whatever has a `data-pick` tells it, and where in it the click was."""

from __future__ import annotations

from typing import Any

import gradio as gr

JS = """
element.addEventListener('click', (event) => {
  const picked = event.target.closest('[data-pick]');
  if (!picked) return;
  const box = picked.getBoundingClientRect();
  trigger('click', {pick: picked.dataset.pick,
                    x: (event.clientX - box.left) / Math.max(box.width, 1),
                    y: (event.clientY - box.top) / Math.max(box.height, 1)});
});
"""


def picker(elem_id: str, value: str = "", **more: Any) -> gr.HTML:
    """Its `click` has an event with `pick`, and `x` and `y` from 0 to 1. Read them with `picked` and `place_in`."""
    return gr.HTML(value, elem_id=elem_id, js_on_load=JS, **more)


def picked(event: gr.EventData, count: int) -> tuple[int, ...] | None:
    """The so many whole numbers, 0 or more, that were picked; None for anything else a browser may send."""
    words = str(getattr(event, "pick", "")).split(",")
    if len(words) != count or not all(word.isascii() and word.isdigit() and len(word) < 9 for word in words):
        return None
    return tuple(map(int, words))


def place_in(event: gr.EventData, width: int, height: int) -> tuple[int, int]:
    """Column and row of the cell that was clicked, of so many."""
    found = []
    for name, count in (("x", width), ("y", height)):
        share = getattr(event, name, 0.0)
        share = float(share) if isinstance(share, int | float) and 0 <= share <= 1 else 0.0
        found.append(min(count - 1, int(share * count)))
    return found[0], found[1]
