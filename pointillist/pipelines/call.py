"""The arguments of a pipeline's call: what it takes, its defaults, and what it can make."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pointillist.accel.models.wan import Wan
from pointillist.pipelines.load import is_embedded

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


def check_can_be_repainted(pipe: Any) -> None:
    """Raise `ValueError` if `repaint` can do nothing with clips of `pipe`."""
    if not Wan().is_member(getattr(pipe, "transformer", None)):
        raise ValueError(f"a {type(pipe).__name__} cannot be repainted; pipelines of the family Wan can")


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
