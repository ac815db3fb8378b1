"""From a name to an ordinary Diffusers pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
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
        pipe = DiffusionPipeline.from_pretrained(str(source), torch_dtype=dtype, local_files_only=not download)
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


def check_can_be_repainted(pipe: Any) -> None:
    """Raise `ValueError` if `repaint` can do nothing with clips of `pipe`."""
    if not Wan().is_member(getattr(pipe, "transformer", None)):
        raise ValueError(f"a {type(pipe).__name__} cannot be repainted; pipelines of the family Wan can")


def is_embedded(pipe: Any) -> bool:
    """Whether `pipe` has the architecture of the model that ships with the package, from wherever it was loaded."""
    transformer: Any = getattr(pipe, "transformer", None)
    if not Wan().is_member(transformer):
        return False
    shipped = json.loads((EMBEDDED_FOLDER / "transformer" / "config.json").read_text(encoding="utf-8"))
    here = json.loads(transformer.to_json_string())  # so that tuples are lists here too
    return all(here.get(name) == value for name, value in shipped.items() if not name.startswith("_"))


NAMES = {
    "height": "height",
    "width": "width",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}
"""Arguments of pipelines, and what they are called here."""
FRAMES = ("num_frames", "frames", "video_length")
"""How pipelines call the number of frames."""


def call_of(pipe: Any, **asked: Any) -> dict[str, Any]:
    """Size, frames, steps and guidance of a call: what is asked, and the defaults for what is None.

    Raises:
        ValueError: the pipeline does not take it, or cannot make it.
    """
    given = {_named(pipe, name): value for name, value in asked.items() if value is not None}
    if unknown := [NAMES.get(name, name) for name in given if name not in takes(pipe)]:
        raise ValueError(f"a {type(pipe).__name__} takes no {' and no '.join(unknown)}; leave it out")
    call = {**defaults(pipe), **given}
    if guides_by_negative(pipe):
        call.setdefault("negative_prompt", " ")
    check_size(pipe, *(call.get(name) for name in ("width", "height", "num_frames")))
    return call


def takes(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a pipeline, or of that which an outline stands for."""
    import diffusers

    kind: Any = type(pipe)
    if not issubclass(kind, diffusers.DiffusionPipeline):
        kind = getattr(diffusers, pipe.config._class_name)
    return inspect.signature(kind.__call__).parameters


def makes_images(pipe: Any) -> bool:
    """Whether what a pipeline makes has no frames."""
    return not {*FRAMES, "video"} & set(takes(pipe))


def guides_by_negative(pipe: Any) -> bool:
    """Whether a pipeline guides, by its defaults, once a negative prompt is given, and by another scale then: as
    Qwen-Image, whose own examples give a blank."""
    scale = takes(pipe).get("true_cfg_scale")
    return scale is not None and isinstance(scale.default, int | float) and scale.default > 1


def _named(pipe: Any, name: str) -> str:
    """As the pipeline calls it."""
    if name == "num_frames":
        return next((each for each in FRAMES if each in takes(pipe)), name)
    return "true_cfg_scale" if name == "guidance_scale" and guides_by_negative(pipe) else name


def defaults(pipe: Any) -> dict[str, Any]:
    """Call arguments that suit `pipe`: size, frames, steps, guidance; but those that it chooses when it is called."""
    if is_embedded(pipe):
        return {
            "height": 176,
            "width": 176,
            "num_frames": 33,
            "num_inference_steps": 20,
            "guidance_scale": 5.0,
        }
    known = {name: each.default for name, each in takes(pipe).items() if name in NAMES}
    return {name: value for name, value in known.items() if value is not None}


EMBEDDED_SIDES = tuple(range(64, 193, 16))
EMBEDDED_FRAMES = tuple(range(17, 130, 4))


def check_size(pipe: Any, width: int | None, height: int | None, frames: int | None) -> None:
    """Raise `ValueError` naming the legal values if `pipe` cannot make such a clip.

    Pipelines whose legal values are not known here check them when they are called.
    """
    if is_embedded(pipe):
        for name, value in (("width", width), ("height", height)):
            if value not in EMBEDDED_SIDES:
                raise ValueError(f"{name} {value} is not possible; the embedded model makes {_listed(EMBEDDED_SIDES)}")
        if frames not in EMBEDDED_FRAMES:
            raise ValueError(f"{frames} frames are not possible; the embedded model makes 17 to 129 in steps of 4")
        return
    patch = getattr(pipe.transformer.config, "patch_size", None)
    if None in (width, height, frames) or not isinstance(patch, list | tuple):
        return
    assert width is not None and height is not None and frames is not None
    step = pipe.vae_scale_factor_spatial * patch[1]
    for name, value in (("width", width), ("height", height)):
        if value < 16 or value % max(16, step):
            raise ValueError(f"{name} {value} is not possible; this model makes multiples of {max(16, step)}")
    if frames < 1 or (frames - 1) % pipe.vae_scale_factor_temporal:
        raise ValueError(
            f"{frames} frames are not possible; this model makes multiples of {pipe.vae_scale_factor_temporal} plus 1"
        )


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
