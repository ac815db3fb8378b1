"""How much an error at a site moves the clip, by perturbation with the errors of a reference candidate.

In two steps, so that it costs a few forward passes and less than two clips, whatever the number of layers:

    a site's error     → the transformer's output: one more forward pass for each layer and bucket, in which that site
                         alone runs sparsely (`profile.Recorder` does it beside its own work)
    a bucket's errors  → the clip: one run for each bucket, in which all sites run sparsely in its steps; for the steps
                         before, the dense run's outputs are played back

Squared errors are taken to add up over heads and layers; over steps, errors do (`curve.py`).
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pointillist.accel.accelerate import accelerate
from pointillist.accel.layouts import Group, lay_out, pattern_for, select
from pointillist.accel.patterns.pattern import Call
from pointillist.accel.plan import Rule
from pointillist.accel.tails import attend
from pointillist.search.run import call_of, run
from pointillist.search.study import Study

REFERENCE, TAIL = Rule("pooled", 0.15), "pooled"
"""The perturbation: errors of a candidate that is neither among the best nor among the worst."""


def reference_output(call: Call) -> torch.Tensor:
    """The reference candidate's output of all heads, [B, H, S, D]."""
    shapes = (call.grid, call.segments, call.block)
    group = Group(pattern_for(REFERENCE.pattern, REFERENCE.density, REFERENCE.options, *shapes))
    return attend(call, lay_out([(group, select(group, call))], call), TAIL)


def relative_error(true: torch.Tensor, other: torch.Tensor) -> float:
    """Squared, of one tensor as a whole."""
    difference = (other.double() - true.double()).square().sum()
    return float(difference / true.double().square().sum().clamp(min=1e-300))


class Playback:
    """What the transformers gave in a dense run of the first prompt, and the clip that came of it."""

    def __init__(self, untimed: tuple[int, ...] = ()) -> None:
        """`untimed`: steps whose time says nothing, because more than the pipeline's own work is done in them."""
        self._untimed = untimed
        self.frames = np.zeros(0)
        self.sigmas: tuple[float, ...] = ()
        self.flops = 0
        """Of one forward pass, beside self-attention."""
        self._seconds: list[float] = []
        self._outputs: dict[tuple[str, str, int | None], Any] = {}

    @property
    def seconds(self) -> float:
        """Of all forward passes, from the median of those that are timed."""
        return statistics.median(self._seconds) * len(self._outputs)

    def keep(self, transformer: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
        """Interceptor (see `Acceleration.intercept`) that remembers every output."""
        start = time.perf_counter()
        if self.flops:
            output = compute()
        else:
            with FlopCounterMode(display=False) as counter:
                output = compute()
            self.flops = counter.get_total_flops()
        if output[0].is_cuda:
            torch.cuda.synchronize(output[0].device)
        if step not in self._untimed:
            self._seconds.append(time.perf_counter() - start)
        self._outputs[transformer, branch, step] = output
        return output

    def velocities(self, study: Study) -> torch.Tensor:
        """float32 [steps, n]: the guided output of every step."""
        steps: dict[int, list[torch.Tensor]] = {}
        for (_, _, step), output in self._outputs.items():
            if step is not None:
                steps.setdefault(step, []).append(output[0])
        return torch.stack([guided(steps[step], study) for step in sorted(steps)])

    def play(self, transformer: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
        """Interceptor that gives what is remembered, and computes what is not."""
        known = self._outputs.get((transformer, branch, step))
        return compute() if known is None else known

    def until(self, first: int) -> Callable[[str, str, int | None, Callable[[], Any]], Any]:
        """Interceptor that plays the steps before `first` and computes the others."""

        def play(transformer: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
            return self.play(transformer, branch, step, compute) if step is not None and step < first else compute()

        return play


def guided(outputs: list[torch.Tensor], study: Study) -> torch.Tensor:
    """float32 [n]: what guidance makes of the outputs of one step, of which the first is that of the prompt."""
    if len(outputs) == 1:
        return outputs[0].float().flatten().cpu()
    shares = study.guidance_shares
    return (shares[0] * outputs[0].float() + shares[1] * outputs[1].float()).flatten().cpu()


def record_playback(pipe: Any, study: Study, stepped: Callable[[int], None]) -> Playback:
    """A dense run of the first prompt."""
    playback = Playback()
    with accelerate(pipe, "none") as handle:
        handle.intercept(playback.keep)
        playback.frames = run(pipe, study, study.prompts[0], stepped)
        playback.sigmas = handle.sigmas
    return playback


def bucket_errors(
    pipe: Any, study: Study, playback: Playback, stepped: Callable[[int], None]
) -> list[tuple[float, float]]:
    """Mean squared errors of the clip, for each bucket, with the reference candidate at all sites in its steps; and of
    the latents, as the errors of these steps' velocities alone would leave them."""
    return [_bucket_error(pipe, study, playback, first, stop, stepped) for first, stop in pairwise(study.edges)]


def _bucket_error(
    pipe: Any, study: Study, playback: Playback, first: int, stop: int, stepped: Callable[[int], None]
) -> tuple[float, float]:
    outputs: dict[int, list[torch.Tensor]] = {}
    played = playback.until(first)

    def keep(transformer: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
        output = played(transformer, branch, step, compute)
        if step is not None and first <= step < stop:
            outputs.setdefault(step, []).append(output[0])
        return output

    with accelerate(pipe, "none") as handle:

        def perturb(site: str, branch: str, step: int | None, q: Any, k: Any, v: Any, out: Any) -> Any:
            if step is None or not first <= step < stop:
                return None
            assert handle.grid is not None
            return reference_output(call_of(study, handle.grid, 0, step, q, k, v)).transpose(1, 2)

        handle.intercept(keep)
        handle.observe(perturb)
        frames = run(pipe, study, study.prompts[0], stepped)
    right, drift = playback.velocities(study), torch.zeros(())
    for step, found in outputs.items():
        drift = drift + step_lengths(playback.sigmas)[step] * (guided(found, study) - right[step])
    clip = float(np.square(frames.astype(np.float64) - playback.frames).mean())
    return clip, float(drift.square().mean())


def step_lengths(sigmas: tuple[float, ...]) -> np.ndarray:
    """[steps]: how far the latents go in each, the last one to 0."""
    return -np.diff([*sigmas, 0.0])
