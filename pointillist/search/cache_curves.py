"""Calibrating step caches for a model: magnitude curves (MagCache) and modulation polynomials (TeaCache).

A few dense clips are watched. Of every step and guidance branch are recorded

    γ_t    mean over tokens of ‖R_t‖ / ‖R_{t−1}‖, R being what all blocks added to the hidden states; of models whose
           blocks are not known, what the whole model added to its latents
    d_in   mean|m_t − m_{t−1}| / mean|m_{t−1}| of the timestep's modulation, where the model tells it
    d_out  the same of the model's output

The curve is the mean of γ over clips and branches. The polynomial is fitted to all pairs (d_in, d_out), least squares.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from pointillist.accel import bridge
from pointillist.accel.accelerate import accelerate
from pointillist.accel.conflicts import Target, model_of, targets_of
from pointillist.accel.step_cache.calibration import DEGREE, Calibration, MadeWith
from pointillist.accel.step_cache.decider import relative_change
from pointillist.accel.step_cache.table import shift_of
from pointillist.search.errors import SearchError

Progress = Callable[[str, int, int], None]


def calibrate_cache(
    pipe: Any,
    prompts: tuple[str, ...],
    call: dict[str, Any],
    plan: Any = "none",
    seed: int = 0,
    progress: Progress = lambda phase, done, of: None,
) -> Calibration:
    """Record curves of `pipe`, which is not accelerated.

    Args:
        prompts: a clip of each; one to four are enough, since curves depend on them little.
        call: arguments of the pipeline beside the prompt: size, frames, steps, guidance.
        plan: of attention: `none`, dense; or whatever `accelerate` takes.

    Raises:
        SearchError, AccelerateError: what does not fit.
    """
    if not prompts:
        raise SearchError("there is no prompt to calibrate with; one is enough")
    if int(call["num_inference_steps"]) < 2:
        raise SearchError(f"{call['num_inference_steps']} steps have no changes between them; 2 or more do")

    def clip(number: int) -> Callable[[], Any]:
        def run() -> None:
            progress("recording clips", number, len(prompts))
            generator = torch.Generator().manual_seed(seed + number)
            pipe(prompt=prompts[number], **call, output_type="latent", generator=generator)

        return run

    return recorded(pipe, [clip(number) for number in range(len(prompts))], plan)


def recorded(pipe: Any, runs: Sequence[Callable[[], Any]], plan: Any = "none") -> Calibration:
    """What `runs` show, each of which makes a clip with `pipe`. Raises SearchError, AccelerateError."""
    targets = targets_of(pipe, sparse=plan != "none")
    clips = [_record(pipe, targets, run, plan) for run in runs]
    curves = np.stack([clip.curve() for clip in clips])  # [clips, steps]
    curve = curves.mean(0)
    pairs = sorted(pair for clip in clips for pair in clip.pairs)
    return Calibration(
        made_with=MadeWith(
            model=model_of(targets),
            scheduler=type(pipe.scheduler).__name__,
            steps=clips[0].steps,
            shift=shift_of(pipe.scheduler),
            plan=clips[0].plan,
        ),
        curve=tuple(round(float(each), 5) for each in curve),
        polynomial=fitted(pairs),
        distances=tuple((float(f"{a:.6g}"), float(f"{b:.6g}")) for a, b in pairs),
        prompts=len(clips),
        spread=round(float(np.abs(curves - curve).max()), 5),
    )


def fitted(pairs: list[tuple[float, float]]) -> tuple[float, ...] | None:
    """Coefficients of the least-squares polynomial of pairs (d_in, d_out), highest degree first; None without pairs.

    Its degree is four, or less for few different distances, so that it does not swing between them.
    """
    if not pairs:
        return None
    before, after = np.array(pairs).T
    different = len(np.unique(before.round(9)))
    degree = min(DEGREE, max(0, (different - 1) // 2))
    if degree == 0:  # all steps change alike: the change itself, times a constant
        scale = float(after.mean() / before.mean()) if before.mean() > 0 else 1.0
        return scale, 0.0
    found = np.polynomial.Polynomial.fit(before, after, degree).convert().coef
    return tuple(float(f"{each:.9g}") for each in found[::-1])


def _record(pipe: Any, targets: tuple[Target, ...], run: Callable[[], Any], plan: Any) -> "_Clip":
    clip = _Clip()
    with accelerate(pipe, plan, cache="none", regions="none") as handle, ExitStack() as undo:
        for target in targets:
            clip.watch(target, undo)
        handle.intercept(clip.call)
        with torch.no_grad():
            run()
        clip.steps, clip.plan = len(handle.sigmas), handle.report().plan
    if not clip.ratios:
        raise SearchError(f"no step of {type(pipe).__name__} was seen; its scheduler does not tell the steps")
    return clip


class _Clip:
    """One generation that is watched."""

    def __init__(self) -> None:
        self.steps, self.plan = 0, "none"
        self.ratios: defaultdict[int, list[float]] = defaultdict(list)
        """γ by step, of every branch."""
        self.pairs: list[tuple[float, float]] = []
        self._before: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
        """Of every branch, which transformer computed its last step, and what it gave."""
        self._now: dict[str, torch.Tensor] = {}
        self._stacks: set[str] = set()

    def watch(self, target: Target, undo: ExitStack) -> None:
        """What goes into a transformer's first block and comes out of its last one, and what modulates them."""
        lists = [list(blocks) for blocks in bridge.block_lists(target.transformer).values()]
        undo.callback(target.family.watch_modulation(target.transformer, self._modulated))
        if not lists:
            undo.callback(target.transformer.register_forward_pre_hook(self._latents, with_kwargs=True).remove)
            return
        first, last = lists[0][0], lists[-1][-1]
        into, out_of = bridge.streams_of(first), bridge.streams_of(last)

        def entered(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._now["in"] = into.into(args, kwargs)[0].detach()

        def left(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._now["residual"] = out_of.out_of(output)[0].detach() - self._now["in"]

        self._stacks.add(target.name)
        undo.callback(first.register_forward_pre_hook(entered, with_kwargs=True).remove)
        undo.callback(last.register_forward_hook(left).remove)

    def _modulated(self, modulation: torch.Tensor) -> None:
        self._now["modulation"] = modulation.detach()

    def _latents(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._now["in"] = (args[0] if args else kwargs["hidden_states"]).detach()

    def call(self, name: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
        """See `Acceleration.intercept`."""
        output = compute()
        now, self._now = {**self._now, "output": output[0].detach()}, {}
        if name not in self._stacks:
            into = now.pop("in")
            now["residual"] = now["output"] - into if now["output"].shape == into.shape else now["output"]
        if step is None:
            return output
        expert, before = self._before.get(branch, ("", {}))
        self._before[branch] = (name, now)
        if not before or before["residual"].shape != now["residual"].shape:
            return output
        self.ratios[step].append(_ratio(now["residual"], before["residual"]))
        if expert == name and "modulation" in now:
            pair = [float(relative_change(now[each], before[each])) for each in ("modulation", "output")]
            if all(np.isfinite(pair)):
                self.pairs.append((pair[0], pair[1]))
        return output

    def curve(self) -> np.ndarray:
        """γ [steps]; 1 where there is no step before."""
        return np.array([np.mean(self.ratios[step]) if step in self.ratios else 1.0 for step in range(self.steps)])


def _ratio(now: torch.Tensor, before: torch.Tensor) -> float:
    """Mean over tokens, whose channels are last in a sequence [B, N, C] and second in latents [B, C, F, H, W]."""
    channels = -1 if now.ndim == 3 else 1
    new, old = (x.float().norm(dim=channels) for x in (now, before))
    return float((new / old.clamp(min=1e-8)).mean())
