"""What a model is, without its weights: enough to say which sizes are legal, which plans fit and what a run takes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pointillist.pipelines.call import EMBEDDED_FRAMES, EMBEDDED_SIDES, defaults
from pointillist.pipelines.load import ModelError, is_embedded, source_of

LEAST_SIDE, MOST_SIDE = 256, 1280
MOST_FRAMES = 161


@dataclass(frozen=True)
class Outline:
    """Stands in for a pipeline wherever only its shape is asked for: a transformer without weights. Of two that take
    turns, which are alike, it has one."""

    name: str
    transformer: Any
    scheduler: Any
    vae_scale_factor_spatial: int
    vae_scale_factor_temporal: int
    config: Any
    """Of the pipeline."""

    @property
    def components(self) -> dict[str, Any]:
        """As of a pipeline."""
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @property
    def embedded(self) -> bool:
        """Whether it is the model that ships."""
        return is_embedded(self)

    @property
    def call(self) -> dict[str, Any]:
        """Default size, frames, steps and guidance."""
        return defaults(self)

    @property
    def sides(self) -> tuple[int, ...]:
        """Legal widths and heights, in pixels."""
        if self.embedded:
            return EMBEDDED_SIDES
        step = max(16, self.vae_scale_factor_spatial * self.transformer.config.patch_size[1])
        return tuple(range(-(-LEAST_SIDE // step) * step, MOST_SIDE + 1, step))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Legal numbers of frames."""
        if self.embedded:
            return EMBEDDED_FRAMES
        return tuple(range(1, MOST_FRAMES + 1, self.vae_scale_factor_temporal))

    @property
    def shift(self) -> float | None:
        """Of the sigmas; None where the scheduler has none."""
        return next((self.scheduler.config[k] for k in ("shift", "flow_shift") if k in self.scheduler.config), None)

    def grid(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """The token grid of a clip."""
        latents = (
            (frames - 1) // self.vae_scale_factor_temporal + 1,
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )
        patch_t, patch_h, patch_w = self.transformer.config.patch_size
        return latents[0] // patch_t, latents[1] // patch_h, latents[2] // patch_w


@lru_cache(maxsize=16)
def outline_of(name: str) -> Outline:
    """Of a model that is on this machine: `embedded`, a folder or a Hub id.

    Raises:
        ModelError: it is not here, or of a kind that is not known.
    """
    import diffusers
    import torch

    source = source_of(name)
    try:
        index = diffusers.DiffusionPipeline.load_config(str(source), local_files_only=True)
        config = {"subfolder": "transformer", "local_files_only": True}
        library, kind = index["transformer"]
        if library != "diffusers":
            raise ModelError(f"the model {name!r} has a transformer of {library}, not of Diffusers")
        transformer = getattr(diffusers, kind)
        with torch.device("meta"):
            skeleton = transformer.from_config(transformer.load_config(str(source), **config))
        scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(
            str(source), subfolder="scheduler", local_files_only=True
        )
        vae = diffusers.AutoencoderKLWan.load_config(str(source), subfolder="vae", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the model {name!r} cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(getattr(skeleton.config, "patch_size", None), list | tuple):
        raise ModelError(f"the sizes that a {kind} makes are not known here; the command line runs it")
    outline = Outline(
        name, skeleton, scheduler, vae.get("scale_factor_spatial") or 8, vae.get("scale_factor_temporal") or 4,
        SimpleNamespace(**{key: value for key, value in index.items() if key != "boundary_ratio"}),
    )  # fmt: skip
    if missing := {"width", "height", "num_frames", "guidance_scale"} - set(outline.call):
        raise ModelError(
            f"what a {index['_class_name']} makes is not known here ({', '.join(sorted(missing))}); the command line "
            "runs it"
        )
    return outline


def models_here() -> list[str]:
    """The embedded model, and every pipeline that the Hub's cache holds."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path.home() / ".cache/huggingface/hub")
    found = set()
    for index in cache.glob("models--*--*/snapshots/*/model_index.json"):
        try:
            values = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if "transformer" in values:
            found.add("/".join(index.parents[2].name.split("--")[1:3]))
    return ["embedded", *sorted(found)]
