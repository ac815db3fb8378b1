"""Maps of attention, and films of what a token sees, as pictures inside the page's HTML."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np

from pointillist.pipelines.inspect import Seen

WIDEST = 224
"""Pixels of a frame in a film."""
STOPS = ((0.0, "#fbf9f4"), (0.35, "#bcd3df"), (0.7, "#2e86ab"), (1.0, "#14213a"))
KEPT, DROPPED = (32, 48, 79), (244, 241, 234)
GLOW, LOST, OWN = np.array([255, 190, 40]), np.array([110, 130, 255]), (255, 45, 85)
"""Attention that the plan keeps, that it drops, and the token itself."""
LIGHT = np.array([0.3, 0.59, 0.11])
BRIGHTEST = 8.0
"""Attention in units of a uniform one that is drawn darkest."""

CSS = """
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 1rem; max-width: 900px; }
.pair figure { margin: 0; position: relative; }
.pair figcaption { font-size: var(--text-sm); color: var(--body-text-color-subdued); margin-bottom: .3rem; }
.pair .square { position: relative; }
.pair img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block; border-radius: 4px;
  border: 1px solid var(--block-border-color); }
.film { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .5rem; max-width: 1400px; }
.film figure { margin: 0; }
.film img { width: 100%; display: block; border-radius: 4px; cursor: crosshair; }
.film figcaption { font-size: 12px; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.film .own img { outline: 3px solid #ff2d55; outline-offset: 1px; }
"""


def head_pair(attention: np.ndarray, kept: np.ndarray, frames: int) -> str:
    """True attention beside what is kept of it, [n, n] both; thin lines between latent frames."""
    recall = float((attention * kept).mean())
    true = _picture(_lined(_scaled(attention / BRIGHTEST), frames))
    mask = kept[..., None] * np.array(KEPT) + (1 - kept[..., None]) * np.array(DROPPED)
    return (
        '<div class="chart"><div class="pair">'
        f"<figure><figcaption>true attention: queries down, keys across, frame by frame</figcaption>{true}</figure>"
        f"<figure><figcaption>what was computed: {kept.mean():.0%} of the pairs, about {recall:.0%} of the attention"
        f"</figcaption>{_picture(_lined(mask, frames))}</figure></div></div>"
    )


def film(shown: np.ndarray, seen: Seen, token: int) -> str:
    """What a token sees, over a frame of the clip for each latent frame; blue where the plan drops it.

    Args:
        shown: uint8 [T, H, W, 3], a frame of the clip for each latent frame.
        token: its number in the grid; clicking another one picks it by `data-pick`, the latent frame.
    """
    times, rows, columns = seen.weights.shape
    strongest = float(np.quantile(seen.weights, 0.995)) or 1e-9
    own = np.unravel_index(token, seen.weights.shape)
    figures = []
    for time in range(times):
        frame = _small(shown[time])
        height, width = frame.shape[:2]
        down, across = np.arange(height) * rows // height, np.arange(width) * columns // width
        heat = np.sqrt((seen.weights[time] / strongest).clip(0, 1))[down][:, across][..., None]
        kept = seen.kept[time][down][:, across][..., None]
        grey = (35 + 0.55 * (frame @ LIGHT))[..., None] * (0.6 + 0.4 * kept)
        lit = (1 - 0.9 * heat) * grey + 0.9 * heat * np.where(kept, GLOW, LOST)
        if time == own[0]:
            mine = (down[:, None] == own[1]) & (across[None] == own[2])
            lit[mine] = OWN
        share, kept_share = float(seen.weights[time].sum()), float(seen.kept[time].mean())
        figures.append(
            f"<figure{' class=own' if time == own[0] else ''}>"
            f'<img data-pick="{time}" alt="latent frame {time}" src="{_uri(lit)}">'
            f"<figcaption>frame {time}: {share:.0%} of its attention, {kept_share:.0%} kept</figcaption></figure>"
        )
    sentence = escape(
        f"The red token (latent frame {own[0]}, row {own[1]}, column {own[2]}) looks where it glows: yellow is kept, "
        f"blue is not. The plan keeps {seen.kept.mean():.0%} of the tokens for it, with {seen.recall:.0%} of its "
        "attention. Click any other token."
    )
    return f'<div class="chart"><p>{sentence}</p><div class="film">{"".join(figures)}</div></div>'


def refreshed(shares: np.ndarray) -> str:
    """In what share of the steps tokens [T, H, W] were computed."""
    figures = "".join(
        f'<figure><img alt="frame {time}" style="image-rendering:pixelated" src="{_uri(_scaled(each))}">'
        f"<figcaption>frame {time}: {each.mean():.0%}</figcaption></figure>"
        for time, each in enumerate(shares)
    )
    return f'<div class="chart"><div class="film">{figures}</div></div>'


def _small(frame: np.ndarray) -> np.ndarray:
    step = -(-frame.shape[1] // WIDEST)
    return frame[::step, ::step]


def _scaled(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as colours [..., 3] from 0 to 255."""
    places = [stop for stop, _ in STOPS]
    rgb = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for _, colour in STOPS])
    return np.stack([np.interp(values.clip(0, 1), places, rgb[:, channel]) for channel in range(3)], -1)


def _lined(pixels: np.ndarray, frames: int) -> np.ndarray:
    """Four times as large, with a line where a frame ends."""
    large = pixels.repeat(4, 0).repeat(4, 1).astype(float)
    for frame in range(1, frames):
        at = round(frame * len(large) / frames)
        large[at] = 0.55 * large[at] + 0.45 * np.array(OWN)
        large[:, at] = 0.55 * large[:, at] + 0.45 * np.array(OWN)
    return large


def _picture(pixels: np.ndarray) -> str:
    return f'<img alt="a map of queries and keys" src="{_uri(pixels)}">'


def _uri(pixels: np.ndarray) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
