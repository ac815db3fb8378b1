"""From a name to an ordinary Diffusers pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pointillist.accel.models.wan import Wan
from pointillist.pipelines.embedded import EMBEDDED_FOLDER
from pointillist.pipelines.longer import EMBEDDED_KNOWN, keep_positions_in_range


class ModelError(ValueError):
    """There is no such model, or it cannot be loaded."""


def load_pipeline(
    name: str = "embedded", *, dtype: Any = None, device: str | None = None, download: bool = False
) -> Any:
    """Load a pipeline: "embedded", a folder, or a Hub id.

    Args:
        dtype: torch dtype of the weights; by default float32 on CPUs and bfloat16 on GPUs.
        device: by default "cuda" if there is one, else "cpu".
        download: allow the network for a Hub id that is not on this machine yet.

    Raises:
        ModelError: what was given, and what is possible.
    """
    import torch
    from diffusers import DiffusionPipeline

    device = _checked_device(device)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    source = source_of(name)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(source), torch_dtype=dtype, local_files_only=not download, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # what a broken folder raises
        hint = "" if isinstance(source, Path) or download else "; if it is a Hub id, add --download to fetch it"
        raise ModelError(f"the model {name!r} cannot be loaded: {str(error).partition(chr(10))[0]}{hint}") from error
    pipe.set_progress_bar_config(disable=True)
    if is_embedded(pipe):
        keep_positions_in_range(pipe.transformer, EMBEDDED_KNOWN)
    return pipe.to(device)


def source_of(name: str) -> Path | str:
    """The folder of a model, or its Hub id. Raises ModelError for what is neither."""
    source = EMBEDDED_FOLDER if name == "embedded" else Path(name)
    if not source.is_dir():
        if name == "embedded" or name.startswith((".", "/")) or name.count("/") != 1:
            raise ModelError(
                f'there is no model {name!r}; allowed are "embedded", a Diffusers folder, or a Hub id such as '
                "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
            )
        return name
    if not (source / "model_index.json").is_file():
        raise ModelError(f"the folder {name!r} has no model_index.json, so it is no Diffusers pipeline")
    return source


def _checked_device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ModelError(f"the device {device!r} is unknown; allowed are cpu, cuda, cuda:0 and the like") from None
    if kind != "cpu" and (kind == "meta" or not getattr(getattr(torch, kind, None), "is_available", bool)()):
        raise ModelError(f"the device {device!r} is not available here; leave --device out to let it be chosen")
    return device


def is_embedded(pipe: Any) -> bool:
    """Whether `pipe` has the architecture of the model that ships with the package, from wherever it was loaded."""
    transformer: Any = getattr(pipe, "transformer", None)
    if not Wan().is_member(transformer):
        return False
    shipped = json.loads((EMBEDDED_FOLDER / "transformer" / "config.json").read_text(encoding="utf-8"))
    here = json.loads(transformer.to_json_string())  # so that tuples are lists here too
    return all(here.get(name) == value for name, value in shipped.items() if not name.startswith("_"))
