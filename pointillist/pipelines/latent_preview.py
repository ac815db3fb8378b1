"""Latents as a small picture, by a linear map of their channels to colours: no model runs.

A map belongs to an autoencoder. `latent_maps.json` has those that were fitted (`tools/fit_latent_map.py`), by what is
in the autoencoder's configuration. For others the three directions in which the latents vary most stand in: shapes
and motion are right then, colours are not.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

MAPS = Path(__file__).parent / "latent_maps.json"
SIGMAS = 2.0
"""Where there is no map: so many standard deviations on either side of the mean are black and white."""


@dataclass(frozen=True)
class LatentMap:
    """A pixel in [0, 1] is a linear function of its latent and of those around it, in the picture and in time."""

    weight: np.ndarray
    """[27 · C, 3], for the offsets of `neighbours`; or [C, 3], of the latent alone."""
    bias: np.ndarray
    """[3]."""

    def frames(self, latents: np.ndarray) -> np.ndarray:
        """uint8 [F, h, w, 3] of latents [C, F, h, w]."""
        values = np.moveaxis(latents, 0, -1)
        pixels = (values if len(self.weight) == len(latents) else neighbours(values)) @ self.weight + self.bias
        return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def neighbours(values: np.ndarray) -> np.ndarray:
    """[F, h, w, 27 · C]: of values [F, h, w, C] each with all around it, those at the border repeated beyond it."""
    padded = np.pad(values, ((1, 1), (1, 1), (1, 1), (0, 0)), mode="edge")
    frames, height, width, _ = values.shape
    shifted = [padded[t : t + frames, y : y + height, x : x + width] for t, y, x in product(range(3), repeat=3)]
    return np.concatenate(shifted, axis=-1)


def look(pipe: Any, latents: torch.Tensor) -> np.ndarray | None:
    """What a clip looks like by now: uint8 [F, h, w, 3]; None where the latents are no picture.

    Args:
        latents: [1, C, F, h, w] or [1, C, h, w], as the pipeline holds them.
    """
    if latents.ndim not in (4, 5):  # some pipelines pack them into tokens
        return None
    first = latents[0].detach().float().cpu().numpy()
    first = first if first.ndim == 4 else first[:, None]
    known = map_of(pipe)
    if known is None or len(known.weight) not in (len(first), 27 * len(first)):
        known = principal(first)
    return known.frames(first)


def clean(latents: torch.Tensor, velocity: torch.Tensor | None, sigma: float, scheduler: Any) -> torch.Tensor:
    """Latents at `sigma` less the noise that is in them by the last velocity, where the scheduler is of a flow."""
    flow = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"
    if velocity is None or not flow or velocity.shape != latents.shape or not 0 <= sigma <= 1:
        return latents
    return latents - sigma * velocity


def map_of(pipe: Any) -> LatentMap | None:
    """The map of a pipeline's autoencoder, if one was fitted."""
    vae = getattr(pipe, "vae", None)
    return _maps().get(fingerprint(vae)) if hasattr(vae, "config") else None


def fingerprint(vae: Any) -> str:
    """Twelve digits of its configuration, which holds the means and deviations of its latents."""
    values = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def fit(latents: np.ndarray, pixels: np.ndarray) -> tuple[LatentMap, float]:
    """The map with the least squared error, and the share of the pixels' variance that it explains.

    Args:
        latents: [N, C], or with all around them [N, 27 · C].
        pixels: [N, 3] in [0, 1], the means over what each of the latents stands for.
    """
    ones = np.concatenate([latents, np.ones((len(latents), 1))], axis=1)
    found = np.linalg.lstsq(ones, pixels, rcond=None)[0]
    left = ((ones @ found - pixels) ** 2).sum() / ((pixels - pixels.mean(0)) ** 2).sum()
    return LatentMap(found[:-1], found[-1]), float(1 - left)


def principal(latents: np.ndarray) -> LatentMap:
    """A map to the three directions in which latents [C, F, h, w] vary most."""
    flat = latents.reshape(len(latents), -1).T.astype(np.float64)
    mean = flat.mean(0)
    directions = np.linalg.eigh(np.cov(flat.T).reshape(len(latents), -1))[1][:, ::-1][:, :3]
    if directions.shape[1] < 3:
        directions = np.repeat(directions[:, :1], 3, axis=1)
    directions *= np.where(directions.sum(0) < 0, -1, 1)  # the sign of an eigenvector is anybody's guess
    weight = directions / np.maximum(2 * SIGMAS * ((flat - mean) @ directions).std(0), 1e-9)
    return LatentMap(weight, 0.5 - mean @ weight)


@lru_cache(maxsize=1)
def _maps() -> dict[str, LatentMap]:
    entries = json.loads(MAPS.read_text(encoding="utf-8"))
    return {name: LatentMap(np.array(each["weight"]), np.array(each["bias"])) for name, each in entries.items()}
