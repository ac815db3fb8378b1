"""Addresses of outputs in the page."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote


def address(path: Path) -> str:
    """Where the browser finds a file of the outputs."""
    return f"gradio_api/file={quote(str(path))}"
