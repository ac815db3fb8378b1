"""A preview as an animated picture in the page."""

from __future__ import annotations

import base64
import io

from pointillist.pipelines.events import Preview

MILLISECONDS = 150
"""Of a latent frame."""


def strip(preview: Preview) -> str:
    """HTML of an animated picture that repeats the latent frames."""
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in preview.frames)
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=rest, duration=MILLISECONDS, loop=0, quality=70)
    source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<img class="job-preview" alt="preview after step {preview.step} of {preview.steps}" src="{source}">'
