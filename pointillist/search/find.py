"""The search: from a ready pipeline, prompts and a wish to a plan.

    1. record     dense runs of the calibration prompts; every candidate is tried at every site (`profile.py`)
    2. weigh      how much an error at a place moves the clip (`sensitivity.py`)
    3. choose     for each time budget the plan with the least predicted error (`curve.py`, `assign.py`)
    4. verify     run plans on held-out prompts and correct the predictions until the wish holds (`wish.py`)

What was measured lies in the search's folder, each part in a file of its own that is written at once and named by what
it depends on. So a search that was interrupted goes on, and several machines may share the parts of one.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save as to_safetensors

from pointillist.accel.conflicts import AccelerateError
from pointillist.accel.plan import Plan
from pointillist.hardware import machine_name
from pointillist.hardware.profile import HardwareProfile
from pointillist.search.assign import OverBudget
from pointillist.search.cost_model import CostModel
from pointillist.search.curve import Choice, Choices, DenseTimes, shape_of
from pointillist.search.errors import SearchError
from pointillist.search.evaluate import KINDS
from pointillist.search.profile import (
    Pass,
    Profile,
    Progress,
    file_of,
    load,
    passes,
    read,
    record,
    write,
)
from pointillist.search.record import Point, SearchRecord
from pointillist.search.region_errors import region_losses
from pointillist.search.reuse import Recorded, Reuse, schedules
from pointillist.search.sensitivity import REFERENCE, TAIL, Playback, bucket_errors, record_playback
from pointillist.search.study import Study
from pointillist.search.verify import Clip, Measured, against, clip
from pointillist.search.wish import Try, Wish, correction, meet

CURVE = (1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0)
"""Speed-ups of attention of the points that are predicted for the Pareto curve."""
REUSING_CURVE = (1.3, 1.6, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
"""Speed-ups of denoising of those points, where steps are reused."""


@dataclass(frozen=True)
class Found:
    """A plan, and how it was found."""

    plan: Plan
    record: SearchRecord
    plans: tuple[Plan, ...] = ()
    """That of every point of the record."""


Curve = tuple[tuple[Point, Plan], ...]
"""Points of a Pareto curve with their plans, from the slowest to the fastest."""


class Search:
    """A search of one study in one folder; several processes may each measure a shard of it."""

    def __init__(
        self,
        pipe: Any,
        study: Study,
        folder: Path,
        progress: Progress = lambda *of: None,
        stages: bool = False,
        reuse: bool = True,
    ) -> None:
        """
        Args:
            stages: choose anew for every step bucket; else one table serves all sparse steps.
            reuse: steps may reuse what others computed.
        """
        self.pipe, self.study, self.folder, self.progress = pipe, study, folder, progress
        self.stages, self.reuse = stages, reuse
        self.no_regions = ""
        """Why there are no region steps to choose."""

    def measure(self, shard: tuple[int, int] = (0, 1)) -> None:
        """Record what is missing of part i of n.

        Raises:
            SearchError: another process does the same here, the pipeline does not fit, or the disk is full.
        """
        jobs: list[Pass | None] = [*passes(self.study), None]
        mine = jobs[shard[0] :: shard[1]]
        playback = None
        for number, job in enumerate(mine, 1):
            path = self._weights_file if job is None else file_of(self.folder, self.study, job)
            with self._alone(path.stem):
                if path.exists():
                    continue
                told = self._told(f"part {number} of {len(mine)}: ")
                with self.spent("sensitivity" if job is None else "profile"):
                    if job is None:
                        self._measure_buckets(playback, told)
                    elif job.prompt == 0:
                        playback = record(self.pipe, self.study, job, path, told)
                    else:
                        record(self.pipe, self.study, job, path, told)

    def find(
        self,
        wish: Wish,
        name: str,
        hardware: HardwareProfile,
        held_out: tuple[str, ...],
        here: bool,
        told: Callable[[Curve], None] = lambda curve: None,
    ) -> Found:
        """The plan, from all that was recorded.

        Args:
            held_out: prompts to run plans on; if there are none, predictions must do.
            here: `hardware` is this machine, so measured times count.
            told: of the curve as it is known so far: when it is predicted, and when another plan was run.

        Raises:
            SearchError: parts are missing, or no plan can do what is wished; says what can be had.
        """
        with self._alone("the choice"):
            runs = Runs(self, held_out)
            if here:
                runs.dense_times()
            start, before = time.perf_counter(), sum(self.bill().values())
            choices = self.choices(hardware, runs if here else None)
            sketch = _Sketch(choices, _curve(choices), name, hardware.name, here)
            told(sketch.curve([]))
            run, known = runs.of(choices, hardware.name), []

            def run_and_tell(choice: Choice) -> Measured:
                known.append(Try(choice, run(choice)))
                told(sketch.curve(known))
                return known[-1].measured

            chosen, tries = meet(wish, choices, run_and_tell if held_out else None, here)
            clips = sum(self.bill().values()) - before
            self._charge("cost model and choosing", time.perf_counter() - start - clips)
            return self._found(sketch, chosen, tries, wish, hardware, runs, here)

    def _measure_buckets(self, playback: Playback | None, told: Callable[[str], Callable[[int], None]]) -> None:
        if playback is None:
            playback = record_playback(self.pipe, self.study, told("a dense clip"))
        errors = bucket_errors(self.pipe, self.study, playback, told("how much errors of its steps move a clip"))
        regions, why = self._region_losses(playback, told("what steps lose that compute a part of the tokens"))
        facts = {
            "seconds": playback.seconds, "machine": self.machine, "flops": playback.flops, "sigmas": playback.sigmas,
            "no regions": why,
        }  # fmt: skip
        velocities = playback.velocities(self.study)
        clips, latents = zip(*errors, strict=True)
        tensors = {
            "errors": torch.tensor(clips), "latent errors": torch.tensor(latents),
            "velocities": (velocities @ velocities.T).double() / velocities.shape[1],
        }  # fmt: skip
        if regions is not None:
            tensors["region losses"] = torch.from_numpy(regions)
        write(self._weights_file, to_safetensors(tensors, {"dense": json.dumps(facts)}))

    def _region_losses(self, playback: Playback, stepped: Callable[[int], None]) -> tuple[np.ndarray | None, str]:
        """None where there can be no region steps, and why."""
        try:
            return region_losses(self.pipe, self.study, playback, stepped), ""
        except (AccelerateError, MemoryError, torch.OutOfMemoryError) as error:
            return None, str(error)

    @property
    def _weights_file(self) -> Path:
        return self.folder / f"weights-{self.study.digest('buckets')}.safetensors"

    def choices(self, hardware: HardwareProfile, runs: "Runs | None") -> Choices:
        """What there is to choose from; `runs` measures times on this machine, None has them predicted."""
        profile = load(self.folder, self.study)
        if not self._weights_file.exists():
            raise SearchError(f"{self.folder} lacks the sensitivity; run the last shard, or the search without --shard")
        tensors, about = read(self._weights_file)
        facts = json.loads(about["dense"])
        self.no_regions = facts["no regions"]
        reference, tail = self.study.rules.index(REFERENCE), self.study.tails.index(TAIL)
        of_reference = profile.errors[:, :, reference, tail, KINDS.index("plain")].sum(-1)
        moved = (of_reference * profile.moved).sum(-1)
        weights = (profile.moved * (tensors["errors"] / moved)[:, None]).double().numpy()
        model = CostModel(hardware, getattr(torch, self.study.dtype))
        times = predicted_times(model, self.study, profile, facts["flops"])
        if runs is not None and (measured := runs.dense_times()):
            times = measured
        elif runs is not None and facts["machine"] == self.machine:
            times = DenseTimes(times.attention, max(0.0, facts["seconds"] - times.attention))
        sigmas = tuple(facts["sigmas"])
        reuse = self._schedules(tensors, sigmas) if self.reuse else ()
        return Choices(self.study, profile, weights, model, times, sigmas, self.stages, reuse)

    def _schedules(self, tensors: dict[str, torch.Tensor], sigmas: tuple[float, ...]) -> tuple[Reuse, ...]:
        """Of steps that reuse what others computed, or compute a part of the tokens."""
        felt = (tensors["errors"] / tensors["latent errors"].clamp(min=1e-30)).double().numpy()
        buckets = np.searchsorted(self.study.edges[1:], range(self.study.steps), side="right").clip(max=len(felt) - 1)
        losses = tensors["region losses"].numpy() if "region losses" in tensors else None
        return schedules(Recorded(tensors["velocities"].double().numpy(), sigmas, felt[buckets], losses))

    def _found(
        self,
        sketch: "_Sketch",
        chosen: Choice,
        tries: list[Try],
        wish: Wish,
        hardware: HardwareProfile,
        runs: "Runs",
        here: bool,
    ) -> Found:
        choices = sketch.choices
        points, plans = zip(*sketch.curve(tries, chosen), strict=True)
        plan = next(plan for point, plan in zip(points, plans, strict=True) if point.chosen)
        settings = {
            "model": self.study.model, "prompts": len(self.study.prompts), "held-out prompts": len(runs.prompts),
            "steps": self.study.steps, "dense steps": self.study.dense_steps, "then dense every": chosen.every,
            "computed steps": list(chosen.computed) or self.study.steps,
            "then a part of the tokens": list(chosen.region_after) or self.no_regions or "none",
            "candidates": len(self.study.rules),
            "tokens": math.prod(choices.profile.grid), "grid": list(choices.profile.grid), "wish": str(wish),
            "hardware": hardware.name, "seed": self.study.seed, "dtype": self.study.dtype,
            "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip
        weights = np.stack([choices.weights[list(stage)].sum(0) for stage in choices.stages])
        return Found(plan, plans=plans, record=SearchRecord(
            settings=settings,
            points=points,
            seconds={**self.bill(), **({"dense clip": round(sum(astuple(choices.dense)), 2)} if here else {})},
            boundaries=tuple(choices.share_before(edge) for edge in (0, *choices.edges[1:])),
            errors=choices.head_errors(chosen).astype(np.float32),
            sensitivity=(weights / weights.mean()).astype(np.float32),
            dense_seconds=np.full(self.study.layers, choices.dense_call, np.float32),
            plan_seconds=choices.call_seconds(chosen).astype(np.float32),
            true_maps=choices.profile.maps.numpy().astype(np.float16),
            kept_maps=_kept(choices, chosen).astype(np.float16),
        ))  # fmt: skip

    @property
    def machine(self) -> str:
        """What measured times hold for."""
        return machine_name(self.pipe.device)

    def bill(self) -> dict[str, float]:
        """Seconds that the parts of this search took, whenever they ran."""
        path = self.folder / "seconds.json"
        return _read_json(path) if path.exists() else {}

    @contextmanager
    def spent(self, phase: str) -> Iterator[None]:
        """What is done inside goes on the bill."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._charge(phase, time.perf_counter() - start)

    def _charge(self, phase: str, seconds: float) -> None:
        bill = self.bill()
        bill[phase] = round(bill.get(phase, 0.0) + seconds, 2)
        write(self.folder / "seconds.json", json.dumps(bill).encode())

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Raises SearchError if another process does `what` in this folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / f"{what.replace(' ', '-')}.lock", timeout=0):
                yield
        except Timeout:
            raise SearchError(
                f"another search is at {what} in {self.folder}; wait for it, or give another --folder"
            ) from None

    def _told(self, prefix: str) -> Callable[[str], Callable[[int], None]]:
        def phase(name: str) -> Callable[[int], None]:
            return lambda step: self.progress(prefix + name, step, self.study.steps)

        return phase


@dataclass(frozen=True)
class _Sketch:
    """The Pareto curve as far as it is known."""

    choices: Choices
    predicted: list[Choice]
    name: str
    """Of the plans."""
    hardware: str
    here: bool

    def curve(self, tries: list[Try], chosen: Choice | None = None) -> Curve:
        """Its points and plans. `tries` were run, and correct the predictions of all."""
        more = correction(tries)
        untried = [each for each in self.predicted if not any(each.same_as(one.choice) for one in tries)]
        if chosen is not None and not any(one.choice is chosen for one in tries):
            untried = [each for each in untried if not each.same_as(chosen)] + [chosen]
        found = [self._of(each, None, more, each is chosen) for each in untried]
        found += [self._of(one.choice, one.measured, more, one.choice is chosen) for one in tries]
        return tuple(sorted(found, key=lambda each: each[0].predicted_speedup))

    def _of(self, choice: Choice, measured: Measured | None, more: float, chosen: bool) -> tuple[Point, Plan]:
        plan = self.choices.plan(choice, self.name, self.hardware)
        predicted = {**plan.predicted, "psnr": round(choice.psnr + more, 3)}
        plan = replace(plan, predicted=predicted, min_tokens=self.choices.crossover(plan))
        if measured is not None:
            times = {"speedup": measured.speedup, "attention_speedup": measured.attention_speedup} if self.here else {}
            figures = {**times, "psnr": measured.psnr, "ssim": measured.ssim, "density": measured.density}
            plan = replace(plan, measured={key: round(value, 4) for key, value in figures.items()})
        return _point(choice, measured, more, self.here, chosen), plan


class Runs:
    """Clips of the held-out prompts. What was measured of a plan is kept in the folder."""

    def __init__(self, search: Search, prompts: tuple[str, ...]) -> None:
        self.prompts = prompts
        self._search = search
        self._dense: dict[int, Clip] = {}

    def dense_times(self) -> DenseTimes | None:
        """Of one dense clip; None if there are no prompts."""
        if not self.prompts:
            return None
        path = (
            self._search.folder / f"dense-{self._search.study.digest('dense', self.prompts, self._search.machine)}.json"
        )
        if not path.exists():
            clips = [self._dense_clip(number) for number in range(len(self.prompts))]
            attention, denoise = (
                float(np.median([getattr(each, name) for each in clips])) for name in ("attention", "denoise")
            )
            write(path, json.dumps([attention, denoise - attention]).encode())
        return DenseTimes(*_read_json(path))

    def of(self, choices: Choices, hardware: str) -> Callable[[Choice], Measured]:
        """What runs a choice, or remembers it."""

        def run(choice: Choice) -> Measured:
            plan = choices.plan(choice, "a try", hardware)
            path = self._file("run", plan.to_json())
            if not path.exists():
                dense = [self._dense_clip(number) for number in range(len(self.prompts))]
                phase = f"verifying at density {_density(plan):.2f}"
                with self._search.spent("verification"):
                    each = [against(one, self._clip(plan, number, phase)) for number, one in enumerate(dense)]
                write(path, json.dumps([asdict(one) for one in each]).encode())
            return _median([Measured(**one) for one in _read_json(path)])

        return run

    def _file(self, kind: str, *about: str) -> Path:
        """Where results lie, which hold for these prompts and this machine."""
        search = self._search
        return search.folder / f"{kind}-{search.study.digest(kind, *about, self.prompts, search.machine)}.json"

    def _dense_clip(self, number: int) -> Clip:
        if number not in self._dense:
            with self._search.spent("dense clips to verify"):
                self._dense[number] = self._clip("none", number, "a dense clip to verify with")
        return self._dense[number]

    def _clip(self, plan: Plan | str, number: int, phase: str) -> Clip:
        search = self._search
        seed = search.study.seed + 1 + number  # noise that nothing was calibrated on
        return clip(
            search.pipe, search.study, plan, self.prompts[number],
            lambda step: search.progress(phase, step, search.study.steps), seed,
        )  # fmt: skip


def _read_json(path: Path) -> Any:
    """Raises SearchError for a file that is not one of ours."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SearchError(f"{path} is broken: {error}; delete it and run the same command again") from error


def predicted_times(model: CostModel, study: Study, profile: Profile, flops: float) -> DenseTimes:
    """Of a dense clip on a machine that is not this one; `flops` are those of one forward pass beside self-attention,
    taken to run as efficiently as dense attention."""
    passes = study.steps * profile.branches
    rate = model.profile.matmul_tflops[study.dtype] * 1e12 * model.profile.dense_efficiency
    dense = model.dense(shape_of(study, profile))
    return DenseTimes(passes * study.layers * dense, passes * flops / rate)


def _curve(choices: Choices) -> list[Choice]:
    found: list[Choice] = []
    for speedup in REUSING_CURVE if choices.reuses else CURVE:
        try:
            choice = (
                choices.at_speedup(speedup)
                if choices.reuses
                else choices.at_attention(choices.dense.attention / speedup)
            )
        except OverBudget:
            break
        if not found or not choice.same_as(found[-1]):
            found.append(choice)
    return found


def _point(choice: Choice, measured: Measured | None, more: float, here: bool, chosen: bool) -> Point:
    return Point(
        name=_named(choice), density=choice.density, predicted_speedup=choice.speedup,
        predicted_psnr=choice.psnr + more, measured_speedup=measured.speedup if measured and here else None,
        measured_psnr=measured.psnr if measured else None, measured_ssim=measured.ssim if measured else None,
        chosen=chosen,
    )  # fmt: skip


def _named(choice: Choice) -> str:
    steps = f", {len(choice.computed)} steps computed" if choice.computed else ""
    steps += ", then regions" if choice.region_after else ""
    return f"density {choice.density:.2f}{steps}"


def _kept(choices: Choices, chosen: Choice) -> np.ndarray:
    """[layers, heads, cells, cells]: what the plan keeps in its first bucket, in the call of the maps."""
    kept = choices.profile.kept.numpy()
    layers, heads = np.indices(chosen.chosen[0].shape)
    return kept[layers, chosen.chosen[0], heads] / 255.0


def _median(each: list[Measured]) -> Measured:
    figures = {name: float(np.median([getattr(one, name) for one in each])) for name in MEDIANS}
    return Measured(**figures, fallbacks=tuple(sorted({text for one in each for text in one.fallbacks})))


MEDIANS = ("speedup", "attention_speedup", "psnr", "ssim", "density")


def _density(plan: Plan) -> float:
    kept = [rule.kept for table in plan.tables for row in table for rule in row]
    return sum(kept) / len(kept)
