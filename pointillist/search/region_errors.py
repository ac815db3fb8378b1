"""What region steps lose, from one run along the dense one: it costs about half a clip.

Every n-th step computes all tokens, the others a part of them. The scheduler is given what the dense run gave, so the
latents are those of the dense run in every step, and what a region step gives differs by its own error alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

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


def region_shares(pipe: Any, study: Study, playback: Playback, stepped: Callable[[int], None]) -> np.ndarray:
    """float64 [steps]: see `Recorded.region_share`. Infinite in the study's dense steps, where there are to be none.

    Raises:
        AccelerateError: the pipeline can have no region steps.
        MemoryRefusedError: what they keep does not fit.
    """
    first = max(study.dense_steps, Regions().kept_steps)
    computed = (*range(first), *range(first + EVERY - 1, study.steps, EVERY))
    shares = tuple(playback.sigmas[step] / playback.sigmas[0] for step in computed)
    schedule = Schedule(computed=shares, region_after=shares[first - 1 :])
    plan = replace(Plan.uniform("dense", 1.0), regions=Regions(share=SHARE), schedule=schedule)
    outputs: dict[int, list[Any]] = {}
    begin = first - Regions().kept_steps  # no region step needs keys of the steps before
    with accelerate(pipe, plan) as handle:

        def keep(transformer: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
            if step is None or step < begin:
                return playback.play(transformer, branch, step, compute)
            output = compute()
            if step not in computed:
                outputs.setdefault(step, []).append(output[0])
            return playback.play(transformer, branch, step, compute)

        handle.intercept(keep)
        run(pipe, study, study.prompts[0], stepped)
        kinds = dict(zip(range(begin, study.steps), handle.report().kinds, strict=True))
    right, known = playback.velocities(study), {}
    for step, found in sorted(outputs.items()):
        if kinds[step] == "region":  # not where all tokens had to be computed, as where another transformer takes over
            last = max(each for each in computed if each < step)
            lost, held = ((each - right[step]).square().mean().sqrt() for each in (guided(found, study), right[last]))
            known[step] = max(float(lost / held.clamp(min=1e-12)), 1e-12)
    steps = np.arange(study.steps)
    between = np.exp(np.interp(steps, list(known), np.log(list(known.values())))) if known else np.inf
    never = (steps < first) | np.isin(steps, [step for step in outputs if step not in known])
    return np.where(never, np.inf, between)
