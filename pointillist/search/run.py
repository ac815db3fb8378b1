"""One generation of a pipeline, as a search makes it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.patterns.pattern import Call
from pointillist.accel.tiles import Grid, whole_video
from pointillist.search.study import Study


def run(pipe: Any, study: Study, prompt: str, stepped: Callable[[int], None], seed: int | None = None) -> Any:
    """The frames of a clip, float32 [F, H, W, C] in [0, 1]; `stepped` is told how many steps are done."""

    def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stepped(step + 1)
        return tensors

    takes = inspect.signature(type(pipe).__call__).parameters
    told = {"callback_on_step_end": after} if "callback_on_step_end" in takes else {}
    generator = torch.Generator("cpu").manual_seed(study.seed if seed is None else seed)
    with torch.no_grad():
        result = pipe(prompt=prompt, **study.call, **told, generator=generator, output_type="np")
    return result.frames[0] if hasattr(result, "frames") else result.images


def call_of(study: Study, grid: Grid, layer: int, step: int, q: Any, k: Any, v: Any) -> Call:
    """An attention call as patterns see it, of q, k, v [B, S, H, D]."""
    return Call(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q.shape[-1] ** -0.5, grid, whole_video(grid),
        study.block, layer=layer, step=step, steps=study.steps,
    )  # fmt: skip
