"""Rendering a region of a finished clip anew: only its tokens are computed, and all other pixels stay as they were.

The steps before the first redone one are not computed: they play the velocities that were kept of the generation. The
first redone step computes all tokens with the new prompt, and leaves their keys and values; the others compute the
tokens of the mask alone, as region steps. Every other token is given its kept velocity, so it comes to the latents
that it had, whatever the sampler. Of the decoded frames, only the mask's pixels are taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pointillist.accel.plan import Plan
from pointillist.accel.regions.policy import Regions
from pointillist.accel.schedule import Schedule
from pointillist.metrics import psnr
from pointillist.pipelines.again import facts_of, request_of
from pointillist.pipelines.events import Phase, Progress, silent
from pointillist.pipelines.generate import (
    GenerateResult,
    Load,
    prepare,
    rounded,
)
from pointillist.pipelines.kept import SETTINGS, Kept, check_kept_file, load_kept, save_kept
from pointillist.pipelines.mask import read_mask, soft_edge, tokens_touched
from pointillist.pipelines.run import run_accelerated, run_once
from pointillist.pipelines.video import (
    Clip,
    OutputError,
    check_format,
    check_output,
    read_clip,
    write_clips,
)

EDGE = 4
"""Pixels inside the mask over which the new clip fades in."""
ALIKE = 25.0
"""Decibels that encoding a clip leaves at least."""


@dataclass(frozen=True)
class RepaintRequest:
    """What to change in which clip. Size, steps, seed, guidance and model are those of the clip.

    Raises:
        ValueError: a value that cannot be, with the allowed ones.
    """

    clip: Path
    mask: str
    """A rectangle `x,y,width,height[,first-last]`, or the path of a picture or clip, white where it is to change."""
    prompt: str
    output: Path = Path("repainted.mp4")
    strength: float = 0.7
    """The share of the steps that are redone: 1 is new inside the mask, less keeps more of its layout."""
    refresh: int = 5
    """Of the redone steps, the first and every n-th after it compute all tokens."""
    kept: Path | None = None
    """What `generate --keep` wrote of the clip; None: where the clip says, else the clip is generated again."""
    keep: Path | None = None
    """Where to keep what another repaint of the new clip needs."""
    device: str | None = None
    """None: that of the clip."""
    download: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError('the prompt is empty; describe the new clip, e.g. "a green square moving left on black"')
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength {self.strength} is not possible; it is a number above 0 and at most 1")
        if self.refresh < 1:
            raise ValueError(f"refresh {self.refresh} is not possible; it is a whole number from 1")
        for path in filter(None, (self.kept, self.keep)):
            check_kept_file(path)
        check_format(self.output, fps=1)


def repaint(request: RepaintRequest, progress: Progress = silent, load: Load | None = None) -> GenerateResult:
    """Carry out `request`; `progress` is called with all that happens. Pipelines come from `load`, or `load_pipeline`.

    Raises:
        ValueError, AccelerateError, ModelError, OutputError: one sentence on what was given and allowed.
    """
    from pointillist.pipelines.call import check_can_be_repainted

    for path in filter(None, (request.output, request.keep)):
        check_output(path)
    facts = facts_of(request.clip)
    original = request_of(request.clip, facts, request.device, request.download)
    mask = read_mask(request.mask, facts["frames"], facts["height"], facts["width"])
    kept, notes = _kept(request, facts), []

    progress(Phase("loading the model"))
    started = time.perf_counter()
    pipe, plan, call = prepare(original if kept is None else original.dense_twin, load)
    check_can_be_repainted(pipe)
    loaded, started = time.perf_counter() - started, time.perf_counter()
    source, again = "kept", 0.0
    if kept is None:
        label = "the clip was not kept and is generated again"
        how = (original.dense, original.cache, original.regions)
        first = run_once(pipe, plan, call, facts["seed"], progress, label, *how, keep=True)
        kept, source, again = Kept.of(first), "generated again", time.perf_counter() - started
        notes = _differing(request.clip, kept)

    call["prompt"] = request.prompt
    work = _Work.of(request, pipe, kept, mask)
    run = work.run(pipe, call, facts["seed"], progress)
    before = kept.pixels.astype(np.float32) / 255
    frames = np.where(mask[..., None], before + soft_edge(mask, EDGE)[..., None] * (run.frames - before), before)

    new = {
        "output": str(request.output), **{name: facts[name] for name in SETTINGS}, "prompt": request.prompt,
        "fps": facts["fps"], "tokens": work.inside.size,
        "repaint": {
            "clip": str(request.clip), "prompt": facts["prompt"], "mask": request.mask, "strength": request.strength,
            "refresh": request.refresh,
        },
        "area": float(mask.mean()), "tokens_masked": int(work.inside.sum()),
        "tokens_computed": work.tokens_computed, "computed": work.tokens_computed / (work.inside.size * facts["steps"]),
        "steps_run": {kind: work.kinds.count(kind) for kind in ("kept", "all", "masked")}, "kinds": list(work.kinds),
        "grid": list(work.inside.shape), "step_seconds": list(run.report.step_seconds),
        "source": source, "load_seconds": loaded,
        "seconds": {
            "total": time.perf_counter() - started, "again": again, "denoise": run.report.denoise_seconds or 0.0,
            "attention": run.report.attention_seconds,
        },
        "psnr_outside": psnr(before[~mask], frames[~mask]), "psnr_inside": psnr(before[mask], frames[mask]),
        "fallbacks": [*notes, *run.notes, *run.report.fallbacks],
    }  # fmt: skip
    progress(Phase("writing"))
    to_keep = Kept.of(run, frames) if request.keep is not None else None
    if request.keep is not None and to_keep is not None:
        new |= {"kept": str(request.keep.absolute()), "kept_bytes": to_keep.nbytes}
    new = rounded(new)
    write_clips({request.output: Clip(frames, new)}, facts["fps"])
    if request.keep is not None and to_keep is not None:
        save_kept(request.keep, to_keep, new)
    return GenerateResult(request.output, new, {"output": request.output})


@dataclass(frozen=True)
class _Work:
    """What a repaint computes."""

    kept: Kept
    inside: np.ndarray
    """bool [T, H, W] of the token grid."""
    patch: tuple[int, int, int]
    """Latents to a token."""
    kinds: tuple[str, ...]
    """Of every step: `kept` (nothing is computed), `all` tokens, or the `masked` ones."""
    refresh: int
    keeps: bool

    @classmethod
    def of(cls, request: RepaintRequest, pipe: Any, kept: Kept, mask: np.ndarray) -> _Work:
        from pointillist.accel.models import family_of

        latents = kept.velocities[0]
        family = family_of(pipe.transformer)
        assert family is not None, "it was checked"
        grid = family.tokens(pipe.transformer, {"hidden_states": latents}).grid
        each = (length // count for length, count in zip(latents.shape[2:], grid, strict=True))
        patch = (next(each), next(each), next(each))
        kinds = _kinds(request, len(kept.sigmas))
        return cls(kept, tokens_touched(mask, grid), patch, kinds, request.refresh, request.keep is not None)

    @property
    def tokens_computed(self) -> int:
        """By one guidance branch in all steps."""
        return _tokens_computed(self.kinds, self.inside)

    def run(self, pipe: Any, call: dict[str, Any], seed: int, progress: Progress) -> Any:
        """The pipeline's `Run` with these tokens alone."""
        import torch

        from pointillist.accel.accelerate import accelerate

        with accelerate(pipe, self._plan()) as handle:
            handle.compute_only(torch.from_numpy(self.inside.ravel().nonzero()[0]))
            handle.intercept(self._answer(torch.device(getattr(pipe, "_execution_device", pipe.device))))
            return run_accelerated(pipe, handle, call, seed, progress, "", self.keeps)

    def _plan(self) -> Plan:
        """Dense, with region steps from the second redone step on."""
        sigmas = self.kept.sigmas
        first = self.kinds.count("kept")
        before = sigmas[first - 1] if first else sigmas[0]
        share = min(1.0, (before + sigmas[first]) / 2 / sigmas[0])
        schedule = Schedule(region_from=share, region_every=self.refresh)
        return replace(Plan.uniform("dense", 1.0), name="repaint", regions=Regions(predictor="last"), schedule=schedule)

    def _answer(self, device: Any) -> Callable[[str, str, int | None, Callable[[], Any]], Any]:
        """Interceptor (see `Acceleration.intercept`): the kept velocity wherever nothing is to change.

        All branches answer with the guided one, of which guidance makes itself.
        """
        import torch

        inside = torch.from_numpy(self.inside).to(device)
        for dimension, size in enumerate(self.patch):
            inside = inside.repeat_interleave(size, dimension)

        def answer(transformer: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
            assert step is not None, "the scheduler's own timesteps are called"
            velocity = self.kept.velocities[step].to(device)
            return (velocity if self.kinds[step] == "kept" else torch.where(inside, compute()[0], velocity),)

        return answer


@dataclass(frozen=True)
class Prediction:
    """What a repaint will cost."""

    area: float
    """The share of the pixels that may change."""
    computed: float
    """Tokens that are computed, as a share of those of a whole generation."""
    seconds: float
    """Without loading the model; from the times of the clip itself."""
    again: float
    """Of them, to generate the clip again, because nothing was kept of it."""


def predict(request: RepaintRequest) -> Prediction:
    """What `repaint` will cost, without a model: a step of all tokens takes as long as a dense one of the clip, others
    in proportion to their tokens.

    Raises:
        ValueError, OutputError: one sentence on what was given and allowed.
    """
    facts = facts_of(request.clip)
    mask = read_mask(request.mask, facts["frames"], facts["height"], facts["width"])
    try:
        inside = tokens_touched(mask, tuple(facts["grid"]))
        timed = zip(facts["kinds"], facts["step_seconds"], strict=True)
        dense = [seconds for kind, seconds in timed if kind in ("dense", "all")] or list(facts["step_seconds"])
        around = facts["seconds"]["total"] - facts["seconds"]["denoise"] - facts["seconds"].get("again", 0.0)
        again = 0.0 if _kept(request, facts) is not None else facts["seconds"]["total"]
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{str(request.clip)!r} does not say how long its steps took; clips of this version of generate do"
        ) from error
    computed = _tokens_computed(_kinds(request, facts["steps"]), inside) / (inside.size * facts["steps"])
    seconds = computed * facts["steps"] * float(np.median(dense)) + around + again
    return Prediction(float(mask.mean()), computed, seconds, again)


def _kinds(request: RepaintRequest, steps: int) -> tuple[str, ...]:
    """Of every step: `kept`, `all` or `masked`."""
    redone = max(1, math.ceil(request.strength * steps - 1e-9))
    again = ("masked" if step % request.refresh else "all" for step in range(redone))
    return (*["kept"] * (steps - redone), *again)


def _tokens_computed(kinds: tuple[str, ...], inside: np.ndarray) -> int:
    each = {"kept": 0, "all": inside.size, "masked": int(inside.sum())}
    return sum(each[kind] for kind in kinds)


def _differing(clip: Path, kept: Kept) -> list[str]:
    """A note if the file does not show what was generated again, as on another machine or with another version."""
    shown = read_clip(clip)
    if shown.shape != kept.pixels.shape:  # a strip of some frames
        return []
    likeness = psnr(shown, kept.pixels / 255)
    return [f"the clip came out differently now: {likeness:.1f} dB from the file"] if likeness < ALIKE else []


def _kept(request: RepaintRequest, facts: dict[str, Any]) -> Kept | None:
    """What was kept of the clip; None if nothing was, and it can be made again."""
    if request.kept is not None:
        return load_kept(request.kept, facts)
    with suppress(OutputError):  # it may be gone, or overwritten
        return load_kept(Path(str(facts.get("kept") or "")), facts)
    if "repaint" in facts:
        raise OutputError(
            f"{str(request.clip)!r} was itself repainted, so it cannot be made again from its settings; "
            "give --kept with what `repaint --keep` kept of it"
        )
    return None
