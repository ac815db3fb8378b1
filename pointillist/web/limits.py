"""What a page may ask for. Sizes and lengths are limited by what the model can make."""

from __future__ import annotations

import unicodedata

PROMPT = 2000
"""Characters."""
STEPS = 100
UPLOAD = "64mb"
"""The largest file that may be sent."""
QUEUE = 8
"""Jobs that may wait."""


def cleaned(text: str | None, name: str = "prompt") -> str:
    """The text without control characters. Raises ValueError for too long a one."""
    text = text or ""
    if len(text) > PROMPT:
        raise ValueError(f"the {name} has {len(text):,} characters; allowed are up to {PROMPT:,}: shorten it")
    return "".join(" " if unicodedata.category(each) in ("Cc", "Cs", "Co", "Cn") else each for each in text).strip()
