"""The main job: from a request to a clip in a file, optionally beside its dense twin."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pointillist.accel.parallel.job import this_job
from pointillist.accel.patterns import pattern_class
from pointillist.accel.plan import Plan, PlanError, Rule
from pointillist.accel.regions.policy import Regions
from pointillist.accel.step_cache.policy import Caching
from pointillist.accel.step_cache.table import CacheTable, is_table
from pointillist.pipelines.events import Phase, Progress, silent
from pointillist.pipelines.job import check_degrees, device_of, seed_of, together
from pointillist.pipelines.kept import Kept, check_kept_file, save_kept
from pointillist.pipelines.run import Run, run_once
from pointillist.pipelines.video import Clip, check_format, check_output, write_clips

SPEEDS = ("exact", "quality", "balanced", "fast")
DENSE_SHARE = 0.15
"""Of the steps that stay dense with `--pattern`."""
ASKED = (
    "shift",
    "device",
    "dtype",
    "speed",
    "plan",
    "pattern",
    "density",
    "options",
    "tail",
    "dense",
    "cache",
    "regions",
)
"""What a file says of its request beside the facts; null is the default."""


@dataclass(frozen=True)
class GenerateRequest:
    """What to make. None means the model's default. A model of images makes a PNG, whatever the output's ending.

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
    options: tuple[str, ...] = ()
    """Of the pattern, like `order=gilbert`."""
    tail: str = "default"
    dense: str = "auto"
    cache: str = "auto"
    regions: str = "auto"
    compare: bool = False
    keep: Path | None = None
    """A safetensors file for what `repaint` needs of this generation."""
    device: str | None = None
    dtype: str | None = None
    download: bool = False
    warm_up: bool = True
    """Run two untimed steps first, so that the times are those of any later run."""
    ulysses: int = 1
    ring: int = 1
    """`ulysses · ring` processes, started by torchrun, make the clip together."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError('the prompt is empty; describe the clip, e.g. "a red circle moving left on black"')
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise ValueError(f"{self.steps} steps are not possible; allowed are 1 to 1000")
        check_format(self.output, self.fps)
        if self.keep is not None:
            check_kept_file(self.keep)
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
        if self.pattern is None and (self.density is not None or self.options or self.tail != "default"):
            raise ValueError(
                "--density, --option and --tail describe a --pattern; give one, e.g. --pattern pooled --density 0.2"
            )
        if self.pattern is not None:
            try:
                self.uniform_plan(steps=1)
            except PlanError as error:
                raise ValueError(str(error)) from error
        if self.cache.startswith("table:"):
            CacheTable.load(self.cache.removeprefix("table:"))
        elif self.cache not in ("auto", "none") and not is_table(self.cache):
            Caching.parse(self.cache)
        if self.regions not in ("auto", "none"):
            Regions.parse(self.regions)
        if self.speed == "exact" and {self.cache, self.regions} - {"auto", "none"}:
            raise ValueError(
                "--speed exact computes everything, so it cannot stand beside --cache or --regions; leave them out"
            )
        check_degrees(self.ulysses, self.ring)
        if self.dtype is not None and self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {self.dtype!r} is unknown; allowed are float32, bfloat16, float16")

    def uniform_plan(self, steps: int) -> Plan:
        """The plan that `pattern`, `density` and `tail` describe, for so many steps."""
        assert self.pattern is not None
        density = 0.25 if self.density is None else self.density
        Rule(self.pattern, density)
        return Plan.uniform(
            self.pattern,
            density,
            tail=self.tail,
            dense_steps=math.ceil(DENSE_SHARE * steps),
            **pattern_class(self.pattern).options_from(self.options),
        )

    @property
    def dense_twin(self) -> GenerateRequest:
        """The same without acceleration."""
        return replace(
            self, plan="none", pattern=None, speed=None, density=None, options=(), tail="default", cache="none",
            regions="none",
        )  # fmt: skip

    @property
    def files(self) -> dict[str, Path]:
        """What is written: `output`, and with `compare` also `dense` and `compare`."""
        named = ("dense", "compare") if self.compare else ()
        beside = {name: self.output.with_name(f"{self.output.stem}_{name}{self.output.suffix}") for name in named}
        return {"output": self.output, **beside}


@dataclass(frozen=True)
class GenerateResult:
    """What was made. `facts` holds the JSON keys of the command line's contract."""

    output: Path
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


Load = Callable[..., Any]
"""Like `load_pipeline`."""


def generate(request: GenerateRequest, progress: Progress = silent, load: Load | None = None) -> GenerateResult:
    """Carry out `request`; `progress` is called with all that happens. Pipelines come from `load`, or `load_pipeline`.

    Raises:
        ValueError, AccelerateError, PlanError, ModelError, OutputError: one sentence on what was given and allowed.
    """
    for path in [*request.files.values(), *filter(None, [request.keep])]:
        check_output(path)
    started = time.perf_counter()
    from pointillist.pipelines.call import makes_images

    progress(Phase("loading the model"))
    pipe, plan, call = prepare(request, load)
    loaded = time.perf_counter() - started
    if makes_images(pipe) and request.output.suffix.lower() != ".png":
        request = replace(request, output=request.output.with_suffix(".png"))
        for path in request.files.values():
            check_output(path)
    with together(pipe, request.ulysses, request.ring) as job:
        return _carry_out(request, pipe, plan, call, loaded, progress if job.rank == 0 else silent)


def _carry_out(
    request: GenerateRequest, pipe: Any, plan: Any, call: dict[str, Any], loaded: float, progress: Progress
) -> GenerateResult:
    """With everything checked and loaded. The first process of a job writes the files; others give a result without."""
    seed = seed_of(request.seed)
    warm_up = request.warm_up
    dense = (
        run_once(pipe, "none", call, seed, progress, "dense", request.dense, warm_up=warm_up)
        if request.compare
        else None
    )
    label = "accelerated" if request.compare else ""
    keep = request.keep is not None
    fast = run_once(
        pipe, plan, call, seed, progress, label, request.dense, request.cache, request.regions, keep, warm_up
    )
    facts = describe(request, call, seed, fast, dense)
    facts["load_seconds"] = round(loaded, 3)
    if request.frames not in (None, facts["frames"]):
        facts["fallbacks"].append(f"{facts['frames']} frames, not {request.frames}: the nearest that this model makes")
    if this_job().rank:
        return GenerateResult(request.output, rounded(facts))

    progress(Phase("writing"))
    kept = None
    if request.keep is not None:
        kept = Kept.of(fast)
        facts |= {"kept": str(request.keep.absolute()), "kept_bytes": kept.nbytes}
    facts = rounded(facts)
    clips = {request.output: Clip(fast.frames, facts)}
    if dense is not None:
        apart = describe(replace(request.dense_twin, output=request.files["dense"]), call, seed, dense, None)
        clips[request.files["dense"]] = Clip(dense.frames, rounded(apart))
        clips[request.files["compare"]] = Clip(_side_by_side(dense.frames, fast.frames), facts)
    write_clips(clips, request.fps)
    if request.keep is not None and kept is not None:
        save_kept(request.keep, kept, facts)
    return GenerateResult(request.output, facts, request.files)


def prepare(request: GenerateRequest, load: Load | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """The pipeline, the plan, and the arguments of its call; everything is checked here."""
    import torch

    from pointillist.accel.conflicts import targets_of
    from pointillist.pipelines.call import call_of, check_can_be_repainted, makes_images, takes
    from pointillist.pipelines.load import load_pipeline

    if request.plan not in (None, "auto", "none"):
        Plan.load(request.plan)  # a bad file is told before a model is loaded
    dtype = getattr(torch, request.dtype) if request.dtype else None
    pipe = (load or load_pipeline)(
        request.model, dtype=dtype, device=device_of(request.device), download=request.download
    )
    targets_of(pipe, sparse=request.plan != "none")
    needed = [
        name for name, each in takes(pipe).items()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and name not in ("self", "prompt")
    ]  # fmt: skip
    if needed:
        raise ValueError(
            f"a {type(pipe).__name__} needs {' and '.join(needed)} beside the prompt, which cannot be given here; "
            "call it from Python: accelerate(pipe)"
        )
    if lacks := {"prompt", "num_inference_steps"} - set(takes(pipe)):
        raise ValueError(
            f"a {type(pipe).__name__} takes no {' and no '.join(sorted(lacks))}; call it from Python: accelerate(pipe)"
        )
    if request.keep is not None:
        check_can_be_repainted(pipe)
    images = makes_images(pipe)
    call = call_of(
        pipe, height=request.height, width=request.width,
        num_frames=None if images and request.frames == 1 else request.frames,
        num_inference_steps=request.steps, guidance_scale=request.guidance,
        negative_prompt=request.negative_prompt or None,
    )  # fmt: skip
    if request.shift is not None:
        pipe.scheduler = _shifted(pipe.scheduler, request.shift)
    call["prompt"] = request.prompt
    return pipe, plan_of(request, call["num_inference_steps"]), call


def plan_of(request: GenerateRequest, steps: int) -> Plan | str:
    """What to hand to `accelerate`: a plan, the path of one, or what it calls `auto`, `none` or a speed."""
    if request.pattern is not None:
        return request.uniform_plan(steps)
    if request.speed == "exact":
        return "none"
    return request.speed or request.plan or "auto"


def _shifted(scheduler: Any, shift: float) -> Any:
    """The same scheduler with another shift of its sigmas, which is `flow_shift` in some of them."""
    config = scheduler.config
    flow = "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
    dynamic = config.get("use_dynamic_shifting", False)
    for name in ("shift", "flow_shift"):
        if name in config and flow and not dynamic:
            return type(scheduler).from_config(scheduler.config, **{name: shift})
    raise ValueError(
        f"--shift is not possible: the {type(scheduler).__name__} of this model "
        + ("shifts by the size of the picture" if dynamic else "has no shift that counts")
    )


def describe(request: GenerateRequest, call: dict[str, Any], seed: int, fast: Run, dense: Run | None) -> dict[str, Any]:
    """The JSON object of the command line's contract."""
    report = fast.report
    facts: dict[str, Any] = {
        "output": str(request.output), "prompt": request.prompt, "negative_prompt": request.negative_prompt,
        "model": request.model, "seed": seed, "steps": call["num_inference_steps"], "frames": len(fast.frames),
        "width": fast.frames.shape[2], "height": fast.frames.shape[1], "fps": request.fps,
        "guidance": call.get("guidance_scale"),
        "tokens": report.tokens, "backend": report.backend, "plan": report.plan, "plan_source": report.plan_source,
        "dense_backend": report.dense_backend, "dense_reason": report.dense_reason,
        "seconds": _seconds(fast), "density": report.density, "density_overall": report.density_overall,
        "steps_run": report.steps, "kinds": list(report.kinds), "cache": report.cache or "none",
        "grid": list(report.grid), "heads": report.heads, "sigmas": list(fast.sigmas),
        "step_seconds": list(report.step_seconds),
        "call_ms": {
            site: {kind: 1e3 * each for kind, each in kinds.items()} for site, kinds in report.call_seconds.items()
        },
        "fallbacks": [*fast.notes, *report.fallbacks],
        "request": {name: getattr(request, name) for name in ASKED},
    }  # fmt: skip
    if this_job().processes > 1:
        facts["processes"] = {"ulysses": request.ulysses, "ring": request.ring}
        if report.balance is not None:
            facts["balance"] = dict(zip(("before", "after"), report.balance, strict=True))
    if dense is not None:
        from pointillist.metrics import compare

        difference = compare(dense.frames, fast.frames)
        facts["dense_seconds"] = _seconds(dense)
        facts["speedup"] = {k: facts["dense_seconds"][k] / max(facts["seconds"][k], 1e-9) for k in facts["seconds"]}
        facts |= {"psnr": difference.psnr, "ssim": difference.ssim}
    return facts


def _side_by_side(left: Any, right: Any) -> Any:
    """Two clips [F, H, W, 3] with a thin line between them."""
    import numpy as np

    line = np.full((*left.shape[:2], 4, 3), 0.5, dtype=left.dtype)
    return np.concatenate([left, line, right], axis=2)


def _seconds(run: Run) -> dict[str, float]:
    report = run.report
    return {
        "total": run.seconds,
        "denoise": report.denoise_seconds or 0.0,
        "attention": report.attention_seconds,
    }


def rounded(value: Any) -> Any:
    """Nested facts as JSON has them, with four decimals."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value
