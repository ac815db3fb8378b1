"""Learning a `CacheTable` (HarmoniCa, arXiv 2410.01723): which modules are worth computing in which steps.

A router holds a logit for every step, layer and module; r = sigmoid(logit), and a table computes where r > 0.1. It is
trained along the pipeline's own trajectories, from noise and prompts alone (step-wise denoising training): at every
step a teacher, in which everything is computed, and a student, whose modules give (1 − r)·kept + r·fresh, see the same
latents, and the sampler goes on with the student's output. So the router meets the errors that its own reuse has
summed up. After each step the logits of that step are changed by

    λ_t · mean((student − teacher)²) + β · Σ r        of the guided outputs

λ_t is the image-error proxy, relative to its mean over the steps. The paper's is ‖x0 − x0^(t)‖², how much the clip
changes if the running table reuses nothing at step t alone (`proxy="paper"`). It counts twice how wrong a step is,
being multiplied by the step's error again, and knows nothing of steps in which nothing is reused. So by default it is
divided by what reuse changed of that step's output: how much of the clip an error of this step costs. β is what a
computed module costs, given or steered to a share.

The logits begin as noise, as in the paper, or (`start="measured"`) as the table that costs least by what reusing each
module was measured to cost (`module_errors.py`); without iterations that table is the result.
"""

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from pointillist.accel import bridge
from pointillist.accel.accelerate import accelerate
from pointillist.accel.conflicts import Target, targets_of
from pointillist.accel.run_state import RunState, watch_branches, watch_generations, wrap
from pointillist.accel.step_cache.table import KINDS, CacheTable, MadeFor, shift_of
from pointillist.files import write_whole
from pointillist.search.errors import SearchError
from pointillist.search.module_errors import best_modules, measure_modules, together

THRESHOLD = 0.1
"""Of r: a module is computed above it."""
LIMIT = 5.0
"""Of the logits' sizes."""
LEAST_WEIGHT = 0.1
"""Of the paper's λ."""
PROXIES = ("sensitivity", "paper")
STARTS = ("measured", "noise")
BEGIN = {True: 1.0, False: -3.5}
"""Logits of a measured start: of modules that are computed, and of those that are reused."""
GAIN = 0.5
"""How fast β follows the share of reused modules: in its logarithm, per trajectory and unit of share."""
VERSION = 1
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Learning:
    """What is learned, and how. Equal ones give equal tables."""

    prompts: tuple[str, ...]
    call: dict[str, Any] = field(hash=False)
    """Arguments of the pipeline beside the prompt: size, frames, steps, guidance."""
    iterations: int = 0
    """Trajectories; each changes the logits of every step once."""
    share: float | None = 0.5
    """Of all modules in all steps, so many are to be reused; or
    beta: what a computed module costs."""
    beta: float | None = None
    rate: float = 0.05
    """Learning rate of AdamW without decay; the paper's 0.01 is for a hundred times as many updates."""
    renew: int = 20
    """After so many trajectories λ is measured anew (C in the paper)."""
    proxy: str = "sensitivity"
    """How λ is measured."""
    start: str = "measured"
    """What the first logits are."""
    clips: int = 2
    """Measured so many, for a measured start."""
    spread: float = 1.0
    """Standard deviation of the first logits, if they are noise; less for few trajectories."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.share is None) == (self.beta is None):
            raise SearchError("a cache table is learned for a share of reused modules or for a beta; give one of them")
        if self.share is not None and not 0 < self.share < 1:
            raise SearchError(f"the share of reused modules is {self.share}; it must be above 0 and below 1")
        if self.beta is not None and not (math.isfinite(self.beta) and self.beta >= 0):
            raise SearchError(f"beta is {self.beta}; it must be a number, 0 or more")
        if self.start not in STARTS:
            raise SearchError(f"the start is {self.start!r}; allowed are {', '.join(STARTS)}")
        if self.start == "measured" and self.share is None:
            raise SearchError("a measured start needs a share of reused modules; with beta, start from noise")
        least = 0 if self.start == "measured" else 1
        if self.iterations < least or self.renew < 1 or self.clips < 1:
            raise SearchError(f"{self.iterations} iterations are not possible; {least} or more are")
        if self.proxy not in PROXIES:
            raise SearchError(f"the proxy is {self.proxy!r}; allowed are {', '.join(PROXIES)}")
        if not self.prompts:
            raise SearchError("there is no prompt to learn with; one is enough")

    @property
    def steps(self) -> int:
        return int(self.call["num_inference_steps"])

    @property
    def guidance(self) -> float:
        return float(self.call.get("guidance_scale", 1.0))

    def to_json(self) -> str:
        """But for the number of iterations: more of them go on where fewer stopped."""
        values = {**asdict(self), "version": VERSION}
        del values["iterations"]
        return json.dumps(values, sort_keys=True, default=str)


@dataclass
class Router:
    """All that learning changes. Tensors are float32 [steps, 2 · layers], attention and mlp of each layer in turn."""

    logits: torch.Tensor
    first: torch.Tensor
    """Moments of the gradients (Adam)."""
    second: torch.Tensor
    weights: torch.Tensor
    """λ [steps]."""
    generator: torch.Generator
    """Draws prompts and seeds."""
    beta: float = 0.0
    iteration: int = 0

    @classmethod
    def begin(cls, learning: Learning, layers: int) -> "Router":
        generator = torch.Generator().manual_seed(learning.seed)
        logits = learning.spread * torch.randn(learning.steps, 2 * layers, generator=generator)
        logits.clamp_(-LIMIT, LIMIT)
        logits[0] = LIMIT  # the first step is computed, and not learned
        zeros = torch.zeros_like(logits)
        weights = torch.ones(learning.steps)
        return cls(logits, zeros, zeros.clone(), weights, generator, beta=learning.beta or 0.0)

    def start_from(self, computed: np.ndarray) -> None:
        """Logits that say which modules are computed, bool [steps, modules]."""
        self.logits[1:] = torch.where(torch.from_numpy(computed[1:]), BEGIN[True], BEGIN[False])

    @property
    def share(self) -> float:
        """Of the modules of all steps, those that are reused."""
        return float((torch.sigmoid(self.logits) <= THRESHOLD).float().mean())

    def table(self, share: float | None, made_for: MadeFor, name: str) -> CacheTable:
        """What is learned by now; with a share, exactly so many modules are reused: those of the least logits."""
        computes = torch.sigmoid(self.logits) > THRESHOLD
        if share is not None:
            order = self.logits[1:].flatten().argsort(stable=True)
            rest = torch.ones(len(order), dtype=torch.bool)
            rest[order[: round(share * self.logits.numel())]] = False
            computes = torch.cat([torch.ones_like(computes[:1]), rest.view_as(computes[1:])])
        rows = {
            kind: tuple("".join("01"[int(each)] for each in row) for row in computes[:, i :: len(KINDS)])
            for i, kind in enumerate(KINDS)
        }
        return CacheTable(rows["attention"], rows["mlp"], made_for, name=name)

    def update(self, step: int, gradient: torch.Tensor, rate: float) -> None:
        """A step of Adam on the logits of one denoising step; every one is updated once in an iteration."""
        first, second, count = self.first[step], self.second[step], self.iteration + 1
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size = (second / (1 - 0.999**count)).sqrt_().add_(1e-12)
        self.logits[step].addcdiv_(first / (1 - 0.9**count), size, value=-rate).clamp_(-LIMIT, LIMIT)

    def save(self, path: Path, learning: Learning) -> None:
        """Raises OSError."""
        tensors = {name: getattr(self, name) for name in _TENSORS} | {"generator": self.generator.get_state()}
        tensors["beta"] = torch.tensor(self.beta, dtype=torch.float64)
        facts = {"learning": learning.to_json(), "iteration": str(self.iteration)}
        write_whole(path, to_safetensors({name: each.contiguous() for name, each in tensors.items()}, facts))

    @classmethod
    def load(cls, path: Path, learning: Learning, layers: int) -> "Router":
        """Raises SearchError for a file that is no checkpoint of this learning."""
        fresh = cls.begin(learning, layers)
        try:
            with safe_open(path, "pt") as file:
                facts, found = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError) as error:
            raise SearchError(f"{path} is no checkpoint: {error}; delete it to begin anew") from error
        if facts.get("learning") != learning.to_json():
            raise SearchError(f"{path} is of a table with other options; give another folder, or delete it")
        fits = all(name in found and found[name].shape == getattr(fresh, name).shape for name in _TENSORS)
        if not fits or not {"generator", "beta"} <= set(found) or not facts.get("iteration", "").isdecimal():
            raise SearchError(f"{path} is no checkpoint of this model; delete it to begin anew")
        fresh.generator.set_state(found["generator"])
        tensors = {name: found[name] for name in _TENSORS}
        return cls(**tensors, generator=fresh.generator, beta=float(found["beta"]), iteration=int(facts["iteration"]))


_TENSORS = ("logits", "first", "second", "weights")


def learn_table(
    pipe: Any,
    learning: Learning,
    checkpoint: Path | None = None,
    progress: Progress = lambda phase, done, of: None,
    name: str = "learned",
) -> CacheTable:
    """Learn a table for `pipe`, which is not accelerated.

    Args:
        checkpoint: a safetensors file, written after each trajectory; if it is there, learning goes on from it, and
            gives what it would have given without a break.

    Raises:
        SearchError, AccelerateError: what does not fit.
    """
    targets = targets_of(pipe, sparse=False)
    if learning.steps < 2:
        raise SearchError(f"{learning.steps} steps leave nothing to reuse; 2 or more do")
    try:
        layers = len(targets[0].family.modules(targets[0].transformer))
    except ValueError as error:
        raise SearchError(str(error)) from error
    made_for = MadeFor(
        model=targets[0].family.fingerprint(targets[0].transformer),
        scheduler=type(pipe.scheduler).__name__,
        shift=shift_of(pipe.scheduler),
        guided=learning.guidance > 1,
    )
    if checkpoint is not None and checkpoint.exists():
        router = Router.load(checkpoint, learning, layers)
    else:
        router = Router.begin(learning, layers)
        if learning.start == "measured":
            router.start_from(_measured(pipe, learning, targets, router.generator, progress))
            if checkpoint is not None:
                router.save(checkpoint, learning)
    while router.iteration < learning.iterations:
        progress("learning the cache table", router.iteration, learning.iterations)
        if router.iteration % learning.renew == 0 and (router.iteration or learning.proxy != "paper"):
            begun = router.iteration or learning.start == "measured"
            table = router.table(None, made_for, name) if begun else CacheTable.every(learning.steps, layers, 2)
            drawn = _draw(learning, router.generator)
            if learning.proxy == "paper":
                router.weights = _image_errors(pipe, learning, table, router.weights, *drawn)
            else:
                router.weights = _sensitivities(pipe, learning, table, *drawn)
        slopes = _Trajectory(learning, router, targets).run(pipe)
        _steer(learning, router, slopes)
        router.iteration += 1
        if checkpoint is not None:
            router.save(checkpoint, learning)
    return router.table(learning.share, made_for, name)


def _measured(
    pipe: Any, learning: Learning, targets: tuple[Target, ...], generator: torch.Generator, progress: Progress
) -> np.ndarray:
    """bool [steps, modules]: the table that costs least by what reusing each module was measured to cost."""
    assert learning.share is not None, "a measured start has a share"
    clips = []
    for number in range(learning.clips):
        progress("measuring what reusing a module costs", number, learning.clips)
        prompt, seed = _draw(learning, generator)

        def run(prompt: str = prompt, seed: int = seed) -> torch.Tensor:
            return generated(pipe, learning, prompt, seed)

        clips.append(measure_modules(run, pipe, targets, lambda outs: guided(outs, learning.guidance), KINDS))
    vectors = together(clips)
    return best_modules(vectors, round(learning.share * vectors.shape[1] * vectors.shape[2]))


def _draw(learning: Learning, generator: torch.Generator) -> tuple[str, int]:
    """A prompt and a seed."""
    which = int(torch.randint(len(learning.prompts), (), generator=generator))
    return learning.prompts[which], int(torch.randint(2**31, (), generator=generator))


def _steer(learning: Learning, router: Router, slopes: torch.Tensor) -> None:
    """β begins where half of the modules would pay for themselves, and follows the share once logits have moved."""
    if learning.share is None:
        return
    if router.iteration == 0:
        router.beta = float(slopes[1:].median())
    elif router.iteration * learning.rate > LIMIT / 2:
        router.beta *= math.exp(GAIN * (learning.share - router.share))


def _image_errors(
    pipe: Any, learning: Learning, table: CacheTable, before: torch.Tensor, prompt: str, seed: int
) -> torch.Tensor:
    """λ [steps], mean 1: how much the latents change if nothing is reused at one step (without gradients).

    Of steps where the table reuses nothing anyway the proxy knows nothing: they keep what they had `before`. With the
    paper's 0 there, all of their modules would be given away before it is measured again.
    """

    def latents(table: CacheTable) -> torch.Tensor:
        with accelerate(pipe, "none", cache=table):
            return generated(pipe, learning, prompt, seed)

    errors, reference = torch.zeros(learning.steps), None
    for step in range(1, learning.steps):
        whole = computed_at(table, step)
        if whole != table:
            reference = latents(table) if reference is None else reference
            errors[step] = float((latents(whole) - reference).double().square().sum())
    if not errors.any():
        return before
    relative = errors / errors[errors > 0].mean()
    return torch.where(errors > 0, relative.clamp(min=LEAST_WEIGHT), before)


def _sensitivities(pipe: Any, learning: Learning, table: CacheTable, prompt: str, seed: int) -> torch.Tensor:
    """λ [steps], mean 1: how much the latents change for each change of a step's guided output, squares of both.

    Where the table reuses something, nothing is reused at that step alone; else everything is.
    """

    def run(table: CacheTable) -> tuple[torch.Tensor, list[torch.Tensor]]:
        outputs: list[torch.Tensor] = []
        with accelerate(pipe, "none", cache=table) as handle:
            handle.watch_velocities(lambda velocity: outputs.append(velocity.detach().clone()))
            return generated(pipe, learning, prompt, seed), outputs

    latents, outputs = run(table)
    found = torch.ones(learning.steps)
    for step in range(1, learning.steps):
        whole = computed_at(table, step)
        changed, others = run(whole if whole != table else computed_at(table, step, False))
        moved = (others[step] - outputs[step]).double().square().sum()
        found[step] = float((changed - latents).double().square().sum() / moved.clamp(min=1e-30))
    found[0] = 0.0  # it is computed in any case
    return found / found[1:].mean()


def computed_at(table: CacheTable, step: int, everything: bool = True) -> CacheTable:
    """The same table, but for one step, in which everything is computed, or nothing."""

    def rows(of: tuple[str, ...]) -> tuple[str, ...]:
        return *of[:step], "01"[everything] * table.layers, *of[step + 1 :]

    return replace(table, attention=rows(table.attention), mlp=rows(table.mlp))


def generated(pipe: Any, learning: Learning, prompt: str, seed: int, **more: Any) -> torch.Tensor:
    """The latents of a clip."""
    call = {**learning.call, **more, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    with torch.no_grad():
        result = pipe(prompt=prompt, **call)
    return result.frames if hasattr(result, "frames") else result.images


class _Trajectory:
    """One generation, in which each step teaches the router. What it keeps ends with it."""

    def __init__(self, learning: Learning, router: Router, targets: tuple[Target, ...]) -> None:
        self._learning, self._router, self._targets = learning, router, targets
        self._state = RunState()
        self._kept: dict[Any, tuple[torch.Tensor, ...]] = {}
        """What modules gave when the student last computed them."""
        self._differences: list[tuple[str, torch.Tensor]] = []
        """Of the running step, by branch: student − teacher."""
        self._row = torch.empty(0)
        self._student = False
        self._slopes = torch.zeros_like(router.logits)

    def run(self, pipe: Any) -> torch.Tensor:
        """|∂(λ · error) / ∂r| [steps, 2 · layers]."""

        def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._learn(step)
            return tensors

        prompt, seed = _draw(self._learning, self._router.generator)
        state = self._state
        with ExitStack() as undo:
            undo.callback(watch_generations(pipe.scheduler, state.begin_generation, state.stepped))
            for target in self._targets:
                undo.callback(watch_branches(target.transformer, state))
                undo.callback(wrap(target.transformer, "forward", self._call_of(target)))
                for layer, kinds in enumerate(target.family.modules(target.transformer)):
                    for i, kind in enumerate(KINDS):
                        for module in kinds[kind]:
                            undo.callback(wrap(module, "forward", self._module(module, 2 * layer + i)))
            generated(pipe, self._learning, prompt, seed, callback_on_step_end=after)
        return self._slopes

    def _call_of(self, target: Target) -> Callable[..., Any]:
        """In place of a transformer's forward pass."""

        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = target.family.named(target.transformer, args, kwargs)
            tokens = target.family.tokens(target.transformer, call)
            self._state.enter(target.name, target.family.timestep(call), tokens)
            form: bridge.Form | None = None
            others: list[torch.Tensor] = []

            def compute() -> torch.Tensor:
                nonlocal form, others
                output = original(*args, **kwargs)
                form = bridge.Form.of(output)
                first, *others = bridge.parts_of(output)
                return first

            try:
                out = self._both(compute)
            finally:
                self._state.leave()
            assert form is not None, "it has been computed"
            return form.give([out, *(other.detach() for other in others)])

        return call

    def _both(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The student's output, detached; the teacher's is compared with it."""
        step, branch = self._state.step, self._state.branch
        if step is None:
            return compute()
        if step == 0:
            return self._as_student(compute)
        teacher = compute()
        if not self._differences:
            self._row = self._router.logits[step].clone().requires_grad_()
        with torch.enable_grad():
            student = self._as_student(compute)
            self._differences.append((branch, student - teacher))
        return student.detach()

    def _as_student(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._student = True
        try:
            return compute()
        finally:
            self._student = False

    def _module(self, module: torch.nn.Module, column: int) -> Callable[..., Any]:
        """In place of a module's forward pass: (1 − r) · kept + r · fresh."""

        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if not self._student:
                return output
            fresh = output if isinstance(output, tuple) else (output,)
            place = (module, self._state.expert, self._state.branch)
            kept = self._kept.get(place)
            if kept is None:
                self._kept[place] = tuple(each.detach() for each in fresh)
                return output
            r = torch.sigmoid(self._row[column]).to(fresh[0].dtype)
            mixed = tuple(old + r * (new - old) for old, new in zip(kept, fresh, strict=True))
            if float(r.detach()) > THRESHOLD:
                self._kept[place] = tuple(each.detach() for each in fresh)
            return mixed if isinstance(output, tuple) else mixed[0]

        return call

    def _learn(self, step: int) -> None:
        """The logits of this step, from what student and teacher gave."""
        if not self._differences:
            return
        router, differences = self._router, self._differences
        with torch.enable_grad():
            error = guided(differences, self._learning.guidance).float().square().mean()
        self._differences = []
        slope = torch.zeros_like(self._row)
        if error.requires_grad:
            slope = router.weights[step] * torch.autograd.grad(error, self._row)[0]
        r = torch.sigmoid(router.logits[step])
        inner = r * (1 - r)  # of the sigmoid
        self._slopes[step] = slope.abs() / inner
        router.update(step, slope + router.beta * inner, self._learning.rate)


def guided(outputs: list[tuple[str, torch.Tensor]], scale: float) -> torch.Tensor:
    """The guided output of a step's branches, each called by its name, or both in one batch, without a prompt first."""
    if scale <= 1:
        return outputs[0][1]
    if len(outputs) == 1:
        without, with_prompt = outputs[0][1].chunk(2)
        return without + scale * (with_prompt - without)
    named = {"uncond" in branch: out for branch, out in outputs}
    if len(named) < 2:  # without names, the prompt's branch comes first
        named = {False: outputs[0][1], True: outputs[1][1]}
    return named[True] + scale * (named[False] - named[True])
