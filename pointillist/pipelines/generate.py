"""The main job: from a request to a clip in a file, optionally beside its dense twin."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pointillist.pipelines.video import check_output, write_clip

SPEEDS = ("exact", "quality", "balanced", "fast")
SPEED_DENSITIES = {"quality": 0.35, "fast": 0.1}
"""Density at the speeds other than exact (dense) and balanced (the plan's own)."""
DENSE_SHARE = 0.15
"""Of the steps that stay dense with `--pattern`."""


@dataclass(frozen=True)
class GenerateRequest:
    """What to make. None means the model's default.

    Raises:
        ValueError: a value that no model can take, with the allowed ones.
    """

    prompt: str
    output: Path = Path("output.mp4")
    model: str = "embedded"
    negative_prompt: str = ""
    steps: int | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    guidance: float | None = None
    shift: float | None = None
    fps: int = 16
    speed: str | None = None
    plan: str | None = None
    pattern: str | None = None
    density: float | None = None
    tail: str = "default"
    compare: bool = False
    device: str | None = None
    dtype: str | None = None
    download: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError('the prompt is empty; describe the clip, e.g. "a red circle moving left on black"')
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise ValueError(f"{self.steps} steps are not possible; allowed are 1 to 1000")
        if not 1 <= self.fps <= 120:
            raise ValueError(f"{self.fps} frames per second are not possible; allowed are 1 to 120")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance {self.guidance} is not possible; it is a number from 0 (1 is off)")
        if self.shift is not None and not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift {self.shift} is not possible; it is a number above 0")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is not possible; it is a whole number from 0 to 2^63 − 1")
        if self.speed is not None and self.speed not in SPEEDS:
            raise ValueError(f"speed {self.speed!r} is unknown; allowed are {', '.join(SPEEDS)}")
        if self.speed is not None and (self.plan is not None or self.pattern is not None):
            raise ValueError(
                "--speed chooses the plan, so it cannot stand beside --plan or --pattern; give one of them"
            )
        if self.plan is not None and self.pattern is not None:
            raise ValueError("--plan and --pattern exclude each other; give one of them")
        if self.pattern is None and (self.density is not None or self.tail != "default"):
            raise ValueError("--density and --tail describe a --pattern; give one, e.g. --pattern pooled --density 0.2")
        if self.dtype is not None and self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {self.dtype!r} is unknown; allowed are float32, bfloat16, float16")


@dataclass(frozen=True)
class Event:
    """One piece of progress. `step` of `steps` counts within the phase; 0 of 0 where it has none."""

    phase: str
    step: int = 0
    steps: int = 0
    seconds_per_step: float | None = None


@dataclass(frozen=True)
class GenerateResult:
    """What was made. `facts` holds the JSON keys of the command line's contract."""

    output: Path
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


Progress = Callable[[Event], None]


def generate(request: GenerateRequest, progress: Progress = lambda event: None) -> GenerateResult:
    """Carry out `request`; `progress` is called with every `Event`.

    Raises:
        ValueError, AccelerateError, PlanError, ModelError, OutputError: one sentence on what was given and allowed.
    """
    check_output(request.output)
    started = time.perf_counter()
    progress(Event("loading the model"))
    pipe, plan, call = prepare(request)
    seed = request.seed if request.seed is not None else secrets.randbelow(2**31)
    loaded = time.perf_counter() - started

    files = {"output": request.output}
    dense = run_once(pipe, "none", call, seed, progress, "dense") if request.compare else None
    fast = run_once(pipe, plan, call, seed, progress, "accelerated" if request.compare else "")
    facts = describe(request, call, seed, fast, dense)
    facts["load_seconds"] = round(loaded, 3)

    progress(Event("writing"))
    writing = time.perf_counter()
    write_clip(request.output, fast.frames, request.fps, facts)
    written = time.perf_counter() - writing
    facts["seconds"]["total"] += written
    if dense is not None:
        facts["dense_seconds"]["total"] += written
        facts["speedup"]["total"] = facts["dense_seconds"]["total"] / facts["seconds"]["total"]
        files |= _write_comparison(request, fast.frames, dense.frames, facts)
    return GenerateResult(request.output, _rounded(facts), files)


def prepare(request: GenerateRequest) -> tuple[Any, Any, dict[str, Any]]:
    """The pipeline, the plan, and the arguments of its call; everything is checked here."""
    import torch

    from pointillist.accel.plan import Plan
    from pointillist.pipelines.load import check_size, defaults, load_pipeline

    if request.plan not in (None, "auto", "none"):
        Plan.load(request.plan)  # a bad file is told before a model is loaded
    dtype = getattr(torch, request.dtype) if request.dtype else None
    pipe = load_pipeline(request.model, dtype=dtype, device=request.device, download=request.download)
    chosen = {
        "height": request.height, "width": request.width, "num_frames": request.frames,
        "num_inference_steps": request.steps, "guidance_scale": request.guidance,
    }  # fmt: skip
    call = {**defaults(pipe), **{name: value for name, value in chosen.items() if value is not None}}
    check_size(pipe, call["width"], call["height"], call["num_frames"])
    if request.shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=request.shift)
    call["prompt"], call["negative_prompt"] = request.prompt, request.negative_prompt
    return pipe, plan_of(request, pipe, call["num_inference_steps"]), call


def plan_of(request: GenerateRequest, pipe: Any, steps: int) -> Any:
    """What to hand to `accelerate`: "auto", "none", a path, or a plan."""
    from pointillist.accel.choose_plan import choose_plan
    from pointillist.accel.conflicts import targets_of
    from pointillist.accel.plan import Plan

    if request.pattern is not None:
        density = 0.25 if request.density is None else request.density
        return Plan.uniform(request.pattern, density, tail=request.tail, dense_steps=math.ceil(DENSE_SHARE * steps))
    if request.speed == "exact":
        return "none"
    if request.speed in SPEED_DENSITIES:
        plan = choose_plan("auto", targets_of(pipe)).plan
        return "none" if plan is None else _at_density(plan, SPEED_DENSITIES[request.speed])
    return request.plan or "auto"


def _at_density(plan: Any, density: float) -> Any:
    """The same plan with another density wherever it is sparse."""
    table = tuple(
        tuple(rule if rule.pattern == "dense" else replace(rule, density=density) for rule in row) for row in plan.table
    )
    return replace(plan, name=f"{plan.name} at density {density:g}", table=table)


@dataclass(frozen=True)
class Run:
    """One run of the pipeline."""

    frames: Any
    """float32 [F, H, W, 3] in [0, 1]."""
    seconds: float
    report: Any


def run_once(pipe: Any, plan: Any, call: dict[str, Any], seed: int, progress: Progress, label: str) -> Run:
    """Run under `plan`, after one untimed step that warms everything up."""
    import torch

    from pointillist.accel.accelerate import accelerate

    prefix = f"{label}: " if label else ""
    with accelerate(pipe, plan) as handle:
        progress(Event(f"{prefix}warming up"))
        pipe(**{**call, "num_inference_steps": 1, "output_type": "latent"}, generator=_generator(seed))
        steps, started = call["num_inference_steps"], time.perf_counter()
        progress(Event(f"{prefix}denoising", 0, steps))

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress(Event(f"{prefix}denoising", step + 1, steps, (time.perf_counter() - started) / (step + 1)))
            if step + 1 == steps:
                progress(Event(f"{prefix}decoding"))
            return tensors

        with torch.no_grad():
            frames = pipe(**call, generator=_generator(seed), output_type="np", callback_on_step_end=after_step).frames[
                0
            ]
        return Run(frames, time.perf_counter() - started, handle.report())


def describe(request: GenerateRequest, call: dict[str, Any], seed: int, fast: Run, dense: Run | None) -> dict[str, Any]:
    """The JSON object of the command line's contract."""
    report = fast.report
    facts: dict[str, Any] = {
        "output": str(request.output), "prompt": request.prompt, "negative_prompt": request.negative_prompt,
        "model": request.model, "seed": seed, "steps": call["num_inference_steps"], "frames": len(fast.frames),
        "width": call["width"], "height": call["height"], "fps": request.fps, "guidance": call["guidance_scale"],
        "tokens": report.tokens, "backend": report.backend, "plan": report.plan, "plan_source": report.plan_source,
        "seconds": _seconds(fast), "density": report.density, "density_overall": report.density_overall,
        "steps_run": report.steps, "fallbacks": list(report.fallbacks),
    }  # fmt: skip
    if dense is not None:
        from pointillist.metrics import compare

        difference = compare(dense.frames, fast.frames)
        facts["dense_seconds"] = _seconds(dense)
        facts["speedup"] = {k: facts["dense_seconds"][k] / max(facts["seconds"][k], 1e-9) for k in facts["seconds"]}
        facts |= {"psnr": difference.psnr, "ssim": difference.ssim}
    return facts


def _write_comparison(request: GenerateRequest, fast: Any, dense: Any, facts: dict[str, Any]) -> dict[str, Path]:
    """Write the dense clip, and both side by side with a thin line between them."""
    import numpy as np

    path = request.output
    files = {name: path.with_name(f"{path.stem}_{name}{path.suffix}") for name in ("dense", "compare")}
    line = np.full((*fast.shape[:2], 4, 3), 0.5, dtype=fast.dtype)
    write_clip(files["dense"], dense, request.fps, {**facts, "plan": "none"})
    write_clip(files["compare"], np.concatenate([dense, line, fast], axis=2), request.fps, facts)
    return files


def _seconds(run: Run) -> dict[str, float]:
    report = run.report
    return {
        "total": run.seconds,
        "denoise": report.denoise_seconds or 0.0,
        "attention": report.attention_seconds,
    }


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value
