"""From a clip's file back to the request that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pointillist.pipelines.generate import ASKED, GenerateRequest
from pointillist.pipelines.kept import SETTINGS
from pointillist.pipelines.video import OutputError, read_settings


def facts_of(clip: Path) -> dict[str, Any]:
    """What the file says of itself. Raises OutputError for a clip that does not say how it was made."""
    if not clip.is_file():
        raise OutputError(f"there is no file {str(clip)!r}")
    facts = read_settings(clip)
    if isinstance(facts, dict) and "remote" in facts:
        raise OutputError(f"{str(clip)!r} was made by the server {facts['remote'].get('server')}, not here")
    missing = [name for name in (*SETTINGS, "fps") if name not in facts] if isinstance(facts, dict) else ["all"]
    if missing:
        raise OutputError(f"{str(clip)!r} lacks settings ({', '.join(missing)}); give a clip of `generate`")
    return facts


def request_of(clip: Path, facts: dict[str, Any], device: str | None = None, download: bool = False) -> GenerateRequest:
    """The request that made the clip, on another device if one is given. Raises OutputError if it is none."""
    try:
        given = {name: value for name in ASKED if (value := facts["request"].get(name)) is not None}
        return GenerateRequest(
            **{**given, "options": tuple(given.get("options", ())), "device": device or given.get("device")},
            **{name: facts[name] for name in SETTINGS if name != "request"}, fps=facts["fps"], download=download,
        )  # fmt: skip
    except (TypeError, AttributeError, ValueError) as error:
        raise OutputError(f"the settings in {str(clip)!r} are none of `generate`: {error}") from error
