"""The search as people ask for it: a model's name or a ready pipeline, prompts, a machine and a wish."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointillist.pipelines import events

if TYPE_CHECKING:
    from pointillist.accel.step_cache.calibration import Calibration
    from pointillist.accel.step_cache.table import CacheTable
    from pointillist.search.find import Curve, Found, Search
    from pointillist.search.study import Study

EMBEDDED_PROMPTS = (
    "a red circle moving right on white",
    "a green star growing on navy",
    "a blue square moving down on gray",
    "a yellow triangle still on brown",
)
PROMPTS = (
    "A cat walks across a sunny kitchen and jumps onto the table",
    "Waves roll onto a rocky beach at dusk, the camera slowly rising",
    "A cyclist rides through a busy street in the rain, seen from behind",
    "A potter shapes a bowl on a spinning wheel, close-up of the hands",
)
"""Shipped prompts: the first is calibrated on, since what heads look at depends on it little; the next verifies."""
CALIBRATION = 1
CLIPS = 2
"""Of which the curves of step caches are means."""
DENSE_SHARE = 0.15
"""Of the steps that are dense in any case: the first ones, which decide the layout of the picture."""
MOST_PROMPTS = 64
"""Each prompt to calibrate on costs two to three dense clips; more change nothing."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SearchRequest:
    """What plan to search. None means the model's default."""

    output: Path
    """The plan, FILE.safetensors."""
    folder: Path
    """For what is measured; what is there already is not measured again."""
    model: str = "embedded"
    hardware: str = "auto"
    target_speedup: float | None = None
    min_psnr: float | None = None
    speed: str = "balanced"
    prompts: str | None = None
    """A text file to calibrate on, a prompt in each line."""
    held_out: str | None = None
    """Likewise, to run plans on."""
    verify: bool = True
    stages: bool = False
    cache: bool = True
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    device: str | None = None
    dtype: str | None = None
    download: bool = False
    shard: tuple[int, int] | None = None
    """Measure only part i of n, counted from 0, and make no plan."""
    merging: bool = False
    """Measure nothing: other processes have."""

    @property
    def asked(self) -> dict[str, Any]:
        """What all shards have in common."""
        values = asdict(self)
        return {name: values[name] for name in values if name not in ("output", "folder", "shard", "merging")}


@dataclass(frozen=True)
class SearchResult:
    """What was found; None if only a shard was measured."""

    found: Found | None
    output: Path


def search(
    request: SearchRequest, progress: events.Progress = events.silent, load: Callable[..., Any] | None = None
) -> SearchResult:
    """Carry out `request`; `progress` is called with all that happens. Pipelines come from `load`, or `load_pipeline`.

    Raises:
        SearchError, ValueError, ModelError, AccelerateError: one sentence on what was given and allowed.
    """
    import torch

    from pointillist.hardware.profile import load_profile
    from pointillist.pipelines.load import load_pipeline
    from pointillist.pipelines.points import write_points
    from pointillist.search.profile import write
    from pointillist.search.wish import Wish

    wish = Wish(request.target_speedup, request.min_psnr, request.speed)
    if request.hardware != "auto":
        load_profile(request.hardware)  # what is wrong is told before minutes are spent
    if request.shard is not None:
        _check_same(request.asked, request.folder / "request.json")
    prompts = None if request.prompts is None else read_prompts(Path(request.prompts))
    held_out = None if request.held_out is None else read_prompts(Path(request.held_out))
    kind = getattr(torch, request.dtype) if request.dtype else None
    size = {"width": request.width, "height": request.height, "num_frames": request.frames}

    def tell(phase: str, step: int, steps: int) -> None:
        progress(events.Step(phase, step, steps))

    progress(events.Phase("loading the model"))
    pipe = (load or load_pipeline)(request.model, dtype=kind, device=request.device, download=request.download)
    found, verify = prepare_search(
        pipe, request.folder, prompts, held_out if request.verify else (), tell, request.stages, request.cache,
        num_inference_steps=request.steps, **size,
    )  # fmt: skip
    if request.shard is None:
        profile, here = machine(request.hardware, found.study.dtype, pipe.device, tell)
    if not request.merging:
        request.folder.mkdir(parents=True, exist_ok=True)
        write(request.folder / "request.json", json.dumps(request.asked).encode())
        found.measure(request.shard or (0, 1))
    if request.shard is not None:
        return SearchResult(None, request.output)

    def keep(curve: Curve) -> None:
        write_points(request.folder, curve)
        progress(events.Phase(f"the curve has {len(curve)} points"))

    plan = found.find(wish, request.output.stem, profile, verify, here, keep)
    write_points(request.folder, tuple(zip(plan.record.points, plan.plans, strict=True)))
    plan.record.save(plan.plan, request.output)
    return SearchResult(plan, request.output)


def _check_same(asked: dict[str, Any], request: Path) -> None:
    """All shards of a search are asked for alike. Raises ValueError."""
    if not request.is_file():
        return
    before = json.loads(request.read_text(encoding="utf-8"))
    for name, value in asked.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, but other shards in {request.parent} were measured with {before.get(name)!r}; "
                "give all shards the same options, or another --folder"
            )


def find_plan(
    pipe: Any,
    *,
    prompts: tuple[str, ...] | None = None,
    held_out: tuple[str, ...] | None = None,
    target_speedup: float | None = None,
    min_psnr: float | None = None,
    speed: str = "balanced",
    hardware: str | os.PathLike[str] = "auto",
    folder: str | os.PathLike[str] | None = None,
    name: str = "searched",
    stages: bool = False,
    cache: bool = True,
    progress: Progress = lambda phase, done, of: None,
    **call: Any,
) -> Found:
    """Search a plan for a pipeline; the result's `plan` goes to `accelerate`, its `record` to reports.

    Args:
        pipe: a pipeline that `accelerate` takes, not accelerated and not compiled.
        prompts: to calibrate on; by default a shipped set.
        held_out: prompts on which plans are run, none of them calibrated on; () trusts predictions.
        target_speedup: of denoising; or
        min_psnr: dB against dense clips; or
        speed: `quality`, `balanced` or `fast`, if neither is given.
        hardware: `auto`, this machine, measured at the first search; or the name or path of a hardware profile.
        stages: choose anew for every step bucket, in place of one table for all sparse steps.
        cache: steps may reuse what others computed; else every one is computed.
        folder: for what is measured; with one, an interrupted search goes on where it stopped.
        call: arguments of the pipeline in place of its defaults, such as height or num_frames.

    Raises:
        SearchError: no plan can do what is wished, or something does not fit; says what.
        ValueError: an argument that is not allowed.
    """
    from pointillist.search.wish import Wish

    wish = Wish(target_speedup, min_psnr, speed)
    with tempfile.TemporaryDirectory() as beside:
        search, verify = prepare_search(
            pipe, Path(folder or beside), prompts, held_out, progress, stages, cache, **call
        )
        profile, here = machine(hardware, search.study.dtype, pipe.device, progress)
        search.measure()
        return search.find(wish, name, profile, verify, here)


def find_cache_table(
    pipe: Any,
    *,
    prompts: tuple[str, ...] | None = None,
    share: float | None = 0.5,
    beta: float | None = None,
    start: str = "measured",
    clips: int = 2,
    iterations: int = 0,
    rate: float = 0.05,
    renew: int = 20,
    spread: float = 1.0,
    proxy: str = "sensitivity",
    checkpoint: str | os.PathLike[str] | None = None,
    name: str = "learned",
    progress: Progress = lambda phase, done, of: None,
    **call: Any,
) -> CacheTable:
    """Learn which modules a pipeline may reuse in which steps; the table goes to `accelerate(cache=…)`.

    Args:
        pipe: a pipeline that `accelerate` takes, not accelerated and not compiled.
        prompts: to learn with; by default a shipped set.
        share: of all modules in all steps, so many are reused; or
        beta: what a computed module costs, as in HarmoniCa; then share must be None, and start `noise`.
        start: `measured`, the table that costs least by what reusing each module was measured to cost; or `noise`, from
            which only iterations learn.
        clips: measured so many, each as much work as four dense clips for every module of the model.
        iterations: of HarmoniCa's training, each a clip of two to four times as much work as a dense one.
        rate: of learning; greater for few iterations.
        renew: after so many iterations it is measured anew which steps matter, at the price of a clip for each step.
        spread: standard deviation of the first logits, if they are noise; less for few iterations.
        proxy: how it is measured which steps matter: `sensitivity`, or `paper` (HarmoniCa's λ).
        checkpoint: a safetensors file, from which an interrupted run goes on.
        call: arguments of the pipeline in place of its defaults, such as height or num_frames. Small clips do.

    Raises:
        SearchError, AccelerateError, ValueError: what does not fit.
    """
    from pointillist.pipelines.call import call_of
    from pointillist.search.cache_table import Learning, learn_table

    prompts = shipped_prompts(pipe) if prompts is None else prompts
    check_prompts(prompts)
    call = call_of(pipe, **call)
    learning = Learning(
        prompts, call, iterations, share, beta, rate, renew, proxy=proxy, start=start, clips=clips, spread=spread
    )
    return learn_table(pipe, learning, None if checkpoint is None else Path(checkpoint), progress, name)


def find_cache_curves(
    pipe: Any,
    *,
    prompts: tuple[str, ...] | None = None,
    plan: Any = "none",
    progress: Progress = lambda phase, done, of: None,
    **call: Any,
) -> Calibration:
    """Calibrate the step caches `magnitude` and `modulated` for a pipeline; `save` writes the file that they take.

    Args:
        pipe: a pipeline that `accelerate` takes, not accelerated and not compiled.
        prompts: a dense clip of each is made; by default two that are shipped.
        plan: of attention, with which the caches will be used: `none` is dense.
        call: arguments of the pipeline in place of its defaults, such as height or num_inference_steps.

    Raises:
        SearchError, AccelerateError, ValueError: what does not fit.
    """
    from pointillist.pipelines.call import call_of
    from pointillist.search.cache_curves import calibrate_cache

    prompts = shipped_prompts(pipe)[:CLIPS] if prompts is None else prompts
    check_prompts(prompts)
    call = call_of(pipe, **call)
    return calibrate_cache(pipe, prompts, call, plan, progress=progress)


def prepare_search(
    pipe: Any,
    folder: Path,
    prompts: tuple[str, ...] | None,
    held_out: tuple[str, ...] | None,
    progress: Progress,
    stages: bool = False,
    cache: bool = True,
    **call: Any,
) -> tuple[Search, tuple[str, ...]]:
    """The search, and the prompts to verify on."""
    from pointillist.search.find import Search

    shipped = shipped_prompts(pipe)
    prompts = shipped[:CALIBRATION] if prompts is None else prompts
    if held_out is None:
        held_out = tuple(prompt for prompt in shipped if prompt not in prompts)[:1]
    elif held_out:
        check_prompts(held_out, "the held-out prompts")
        if both := [prompt for prompt in held_out if prompt in prompts]:
            raise ValueError(f"{both[0]!r} is among the prompts to calibrate on and the held-out ones; keep it in one")
    return Search(pipe, study_of(pipe, prompts, **call), folder, progress, stages, cache), held_out


def study_of(pipe: Any, prompts: tuple[str, ...], **call: Any) -> Study:
    """What is measured of a pipeline. Raises ValueError and AccelerateError for what cannot be searched."""
    from pointillist.accel.conflicts import targets_of
    from pointillist.pipelines.call import call_of
    from pointillist.search.candidates import TAILS, candidates
    from pointillist.search.errors import SearchError
    from pointillist.search.study import Study

    check_prompts(prompts)
    target = targets_of(pipe)[0]
    sites = target.family.sites(target.transformer)
    if not sites:
        raise SearchError(f"{target.name} has no self-attention that could be sparse; there is nothing to search")
    if target.family.TEXT != "none":
        raise SearchError(
            f"{target.name} is of the family {target.family.NAME}, whose self-attention has text beside the video; the "
            "search measures the video alone and cannot search it yet: accelerate(pipe) takes the family's preset"
        )
    call = call_of(pipe, **call)
    steps, heads = call["num_inference_steps"], target.family.heads(target.transformer)
    if steps < 2:
        raise ValueError(f"{steps} steps cannot be searched: the first is dense, so there must be 2 or more")
    return Study(
        model=target.family.fingerprint(target.transformer),
        layers=len(sites),
        heads=heads,
        head_dim=target.family.output_weight(*sites[0]).shape[1] // heads,
        prompts=prompts,
        call=call,
        rules=candidates(),
        tails=TAILS,
        steps=steps,
        dense_steps=math.ceil(DENSE_SHARE * steps),
        dtype=str(target.transformer.dtype).removeprefix("torch."),
    )


def machine(hardware: str | os.PathLike[str], dtype: str, device: Any, progress: Progress) -> tuple[Any, bool]:
    """The hardware profile, and whether it is of this machine: `auto` is, and is measured once for each dtype."""
    import torch

    from pointillist.hardware import machine_name
    from pointillist.hardware.profile import load_profile
    from pointillist.search.calibrate import calibrate
    from pointillist.search.cost_model import seconds_per

    if os.fspath(hardware) != "auto":
        named = load_profile(hardware)
        seconds_per(named, getattr(torch, dtype))  # a dtype that it does not know is told at once
        return named, False
    path = _cache() / f"{machine_name(device)}-{_kernels(device)}-{dtype}.json"
    if path.exists():
        return load_profile(path), True
    profile = calibrate(
        device, getattr(torch, dtype), lambda message: progress(f"measuring this machine: {message}", 0, 0)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.save(path)
    return profile, True


def shipped_prompts(pipe: Any) -> tuple[str, ...]:
    """Prompts that suit a pipeline."""
    from pointillist.pipelines.load import is_embedded

    return EMBEDDED_PROMPTS if is_embedded(pipe) else PROMPTS


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one in each line. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; give a text file with one prompt in each line")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not text in UTF-8: {error}") from error
    prompts = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    check_prompts(prompts, str(path))
    return prompts


def check_prompts(prompts: tuple[str, ...], source: str = "prompts") -> None:
    """Raises ValueError for none, too many, or what are not prompts."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{source} is {prompts!r:.100}; it must be a tuple of texts")
    if not prompts:
        raise ValueError(f"{source} holds no prompt; one is enough")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(
            f"{source} holds {len(prompts)} prompts; allowed are up to {MOST_PROMPTS}, and one is enough: each costs "
            "as much as two or three dense clips"
        )


def _kernels(device: Any) -> str:
    """What computes sparse attention there, and which version of the counts a profile was fitted to."""
    from pointillist.kernels.cpu.block_sparse import how
    from pointillist.search.work import VERSION

    if device.type != "cpu":
        return f"triton-{VERSION}"
    return f"{'compiled' if how().startswith('compiled') else 'operators'}-{VERSION}"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pointillist" / "hardware"
