"""One run of a pipeline under a plan: its frames, its time, and what it reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pointillist.accel.schedule import Schedule
from pointillist.pipelines.events import Phase, Progress, Step
from pointillist.pipelines.longer import note_on_length

if TYPE_CHECKING:
    from pointillist.pipelines.load import ModelError


@dataclass(frozen=True)
class Run:
    """One run of the pipeline."""

    frames: Any
    """float32 [F, H, W, 3] in [0, 1]."""
    seconds: float
    report: Any
    velocities: tuple[Any, ...]
    """What the scheduler was given in each step: tensors in the shape of the latents, on the CPU. None if not kept."""
    sigmas: tuple[float, ...]
    """Of all steps."""
    notes: tuple[str, ...] = ()
    """What its report does not know."""


def run_once(
    pipe: Any,
    plan: Any,
    call: dict[str, Any],
    seed: int,
    progress: Progress,
    label: str,
    dense: str = "auto",
    cache: str = "auto",
    regions: str = "auto",
    keep: bool = False,
    warm_up: bool = True,
) -> Run:
    """Run under `plan`, after two untimed steps that warm everything up, if it should; some schedules have no single
    one.

    Raises:
        ModelError: the model made values that are not finite.
    """
    from pointillist.accel.accelerate import accelerate
    from pointillist.accel.choose_plan import choose_plan
    from pointillist.accel.conflicts import targets_of

    prefix = f"{label}: " if label else ""
    if not warm_up:
        with accelerate(pipe, plan, cache=cache, regions=regions, dense=dense) as handle:
            return run_accelerated(pipe, handle, call, seed, progress, prefix, keep)
    chosen = choose_plan(plan, targets_of(pipe, sparse=plan != "none")).plan
    once = "none" if chosen is None else replace(chosen, schedule=Schedule(), cache=None, regions=None)
    with accelerate(pipe, once, dense=dense):
        progress(Phase(f"{prefix}warming up"))
        pipe(**{**call, "num_inference_steps": 2, "output_type": "latent"}, generator=_generator(seed))
    with accelerate(pipe, plan, cache=cache, regions=regions, dense=dense) as handle:
        return run_accelerated(pipe, handle, call, seed, progress, prefix, keep)


def run_accelerated(
    pipe: Any, handle: Any, call: dict[str, Any], seed: int, progress: Progress, prefix: str, keep: bool
) -> Run:
    """Run the pipeline once, as the handle of its acceleration has been told to.

    Args:
        keep: velocities, which are of the size of the latents in every step.

    Raises:
        ModelError: the model made values that are not finite.
    """
    import numpy as np
    import torch

    from pointillist.pipelines.call import takes
    from pointillist.pipelines.latent_preview import clean, look

    steps, started = call["num_inference_steps"], time.perf_counter()
    velocities: list[Any] = []
    latest: list[Any] = [None]
    count = 0
    progress(Step(f"{prefix}denoising", 0, steps))

    def done(step: int, see: Callable[[], np.ndarray | None] | None = None) -> None:
        progress(Step(f"{prefix}denoising", step, steps, (time.perf_counter() - started) / step, see))
        if step == steps:
            progress(Phase(f"{prefix}decoding"))

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        if not torch.isfinite(latents).all():
            raise _not_finite(pipe, f" in step {step + 1} of {steps}")

        def see() -> np.ndarray | None:
            noise = handle.sigmas[step + 1] if step + 1 < steps else 0.0
            return look(pipe, clean(latents, latest[0], noise, pipe.scheduler))

        done(step + 1, see)
        return tensors

    def seen(velocity: Any) -> None:
        nonlocal count
        latest[0], count = velocity, count + 1
        if keep:
            velocities.append(velocity.to("cpu", copy=True))
        if not watched and count <= steps:  # samplers of the second order are called twice in a step
            done(count)

    watched = {"callback_on_step_end": after_step} if "callback_on_step_end" in takes(pipe) else {}
    handle.watch_velocities(seen)
    with torch.no_grad():
        try:
            result = pipe(**call, **watched, generator=_generator(seed), output_type="np")
        except (TypeError, AttributeError) as error:
            _check_pictures(pipe, error)
            raise
    frames = result.images[:1] if hasattr(result, "images") else result.frames[0]
    seconds = time.perf_counter() - started
    if not np.isfinite(frames).all():
        raise _not_finite(pipe)
    report = handle.report()
    vae_decode = getattr(getattr(pipe, "vae", None), "decode", None)
    notes = [*note_on_length(pipe.transformer, report.grid[0]), *getattr(vae_decode, "notes", ())]
    return Run(frames, seconds, report, tuple(velocities), handle.sigmas, tuple(notes))


def _check_pictures(pipe: Any, error: Exception) -> None:
    """Raise ModelError if what failed is a pipeline that takes pictures: few check that they were given one."""
    from pointillist.pipelines.call import takes
    from pointillist.pipelines.load import ModelError

    pictures = [name for name in takes(pipe) if name in ("image", "video", "mask_image", "control_image")]
    if pictures:
        raise ModelError(
            f"a {type(pipe).__name__} takes {' and '.join(pictures)} too, which cannot be given here, and failed "
            f"without ({error}); call it from Python: accelerate(pipe)"
        ) from error


def _not_finite(pipe: Any, where: str = "") -> ModelError:
    from pointillist.pipelines.load import ModelError

    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    return ModelError(f"the model made values that are not finite{where}, in {dtype}; try another --dtype")


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator("cpu").manual_seed(seed)
