"""What the page has of a finished clip: its settings, read from the file, as controls and as words."""

from __future__ import annotations

import html
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pointillist.pipelines.video import OutputError, read_settings

WORDS = {"dense": "dense", "sparse": "sparse", "cached": "reused", "region": "regions"}


def settings_of(path: Path) -> dict[str, Any] | None:
    """The facts in a file; None if it has none."""
    try:
        return _settings(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=1024)
def _settings(path: Path, changed: int) -> dict[str, Any] | None:
    try:
        facts = read_settings(path)
    except (OutputError, OSError, ValueError, SyntaxError):
        return None
    return facts if isinstance(facts, dict) and isinstance(facts.get("prompt"), str) else None


def chips(facts: Mapping[str, Any]) -> str:
    """What made a clip, in a few words, as HTML."""
    seconds = facts.get("seconds") or {}
    words = [
        ("", f"{facts.get('width')}×{facts.get('height')}, {facts.get('frames')} frames"),
        ("steps", facts.get("steps")),
        ("seed", facts.get("seed")),
        ("plan", facts.get("plan")),
        ("density", facts.get("density")),
        ("time", f"{seconds['total']:.1f} s" if isinstance(seconds.get("total"), int | float) else None),
        ("speed-up", f"{facts['speedup']['total']:.2f}×" if isinstance(facts.get("speedup"), dict) else None),
    ]
    shown = ((name, str(value)) for name, value in words if value is not None)
    return '<div class="chips">' + "".join(
        f"<span>{f'<b>{html.escape(name)}</b> ' if name else ''}{html.escape(value)}</span>" for name, value in shown
    ) + "</div>"  # fmt: skip


def notes(facts: Mapping[str, Any]) -> str:
    """Every fallback with its reason, as HTML."""
    said = [each for each in facts.get("fallbacks") or () if isinstance(each, str)]
    return "".join(f'<div class="note">{html.escape(each)}</div>' for each in said)


def timeline(kinds: tuple[str, ...] | list[str]) -> str:
    """The kind of every step, as HTML: a row of cells and a legend."""
    kinds = [kind for kind in kinds if kind in WORDS]
    cells = "".join(f'<i class="k-{kind}" title="step {n}: {WORDS[kind]}"></i>' for n, kind in enumerate(kinds, 1))
    legend = "".join(
        f'<span><i class="k-{kind}"></i>{kinds.count(kind)} {word}</span>'
        for kind, word in WORDS.items()
        if kind in kinds
    )
    return f'<div class="steps">{cells}</div><div class="legend">{legend}</div>'
