"""What region steps lose, from one run along the dense one: it costs about half a clip.

Every n-th step computes all tokens, the others a part of them. The scheduler is given what the dense run gave, so the
latents are those of the dense run in every step, and what a region step gives differs by its own error alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pointillist.accel.accelerate import accelerate
from pointillist.accel.plan import Plan
from pointillist.accel.regions.policy import Regions
from pointillist.accel.schedule import Schedule
from pointillist.search.run import run
from pointillist.search.sensitivity import Playback, guided
from pointillist.search.study import Study

SHARE = 0.25
"""Of the tokens that region steps of searched plans compute."""
EVERY = 4
SAME = 1e-5
"""Velocities that differ by less were not computed anew."""
LEAST = 1e-12


def region_losses(pipe: Any, study: Study, playback: Playback, stepped: Callable[[int], None]) -> np.ndarray:
    """float64 [2, steps]: see `Recorded.in_regions`. Infinite in the study's dense steps, where there are to be none.

    Raises:
        AccelerateError: the pipeline can have no region steps.
        MemoryRefusedError: what they keep does not fit.
    """
    first = max(study.dense_steps, Regions().kept_steps)
    computed = (*range(first), *range(first + EVERY - 1, study.steps, EVERY))
    shares = tuple(playback.sigmas[step] / playback.sigmas[0] for step in computed)
    schedule = Schedule(computed=shares, region_after=shares[first - 1 :])
    plan = replace(Plan.uniform("dense", 1.0), regions=Regions(share=SHARE), schedule=schedule)
    parts: dict[int, list[Any]] = {}
    begin = first - Regions().kept_steps  # no region step needs keys of the steps before
    with accelerate(pipe, plan) as handle:

        def keep(transformer: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
            if step is None or step < begin:
                return playback.play(transformer, branch, step, compute)
            output = compute()
            if step not in computed:
                parts.setdefault(step, []).append(output[0])
            return playback.play(transformer, branch, step, compute)

        handle.intercept(keep)
        run(pipe, study, study.prompts[0], stepped)
        outputs = {step: guided(each, study) for step, each in parts.items()}
        kinds = dict(zip(range(begin, study.steps), handle.report().kinds, strict=True))
    return _interpolated(playback.velocities(study), outputs, kinds, computed, playback.sigmas)


def _interpolated(
    right: torch.Tensor,
    found: dict[int, torch.Tensor],
    kinds: dict[int, str],
    computed: tuple[int, ...],
    sigmas: tuple[float, ...],
) -> np.ndarray:
    """From velocities [steps, n] and those of region steps [n] to what each step loses, between those that were run."""
    known: dict[int, tuple[float, float]] = {}
    shown = {step: right[step] for step in computed}
    for step, velocity in sorted(found.items()):
        before, last = [each for each in computed if each < step][-2:]
        shown[step] = velocity
        if kinds[step] != "region":  # all tokens had to be computed, as where another transformer takes over
            continue
        lost, kept = (velocity - right[step]).square(), (velocity - shown[step - 1]).abs() < SAME
        whole = (right[last] - right[step]).square().mean().sqrt()
        remainder = (sigmas[last] - sigmas[step]) * (sigmas[before] - sigmas[step])
        by_kept, by_keys = ((lost * each).mean().sqrt() for each in (kept, ~kept))
        known[step] = max(float(by_kept / whole), LEAST), max(float(by_keys) / remainder, LEAST)
    steps = np.arange(len(right))
    never = np.isin(steps, list(found.keys() - known.keys())) | (steps < min(found, default=len(steps)))
    if not known:
        return np.full((2, len(steps)), np.inf)
    logs = np.log(list(known.values()))
    between = np.exp([np.interp(steps, list(known), part) for part in logs.T])
    return np.where(never, np.inf, between)
