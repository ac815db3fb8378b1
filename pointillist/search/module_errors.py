"""What it costs to reuse each module, measured; and the cache table that costs least by it.

Dense clips are watched. At every step each module in turn, alone, gives what it gave 1, 2, 4 or 7 steps before: what
this changes of the step's guided output is kept as a vector (between these ages it is interpolated). Times how far the
latents go in the step and how much the clip feels an error there, this is what the module adds to the clip's error.
How much the clip feels is measured too: once for every step, all modules reuse the step before there and nowhere else.
It differs much between clips in the first steps, so the geometric mean of the clips counts.

Errors are taken to add up as vectors within a step. Over steps two sums bound them, and half of each is made least: of
vectors, in which errors that differ cancel, and of lengths, in which none does. The table begins with fixed intervals
and changes one module for another as long as that helps.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from pointillist.accel.accelerate import accelerate
from pointillist.accel.conflicts import Target
from pointillist.accel.run_state import wrap

AGES = (1, 2, 4, 7)
OLDEST = 8
"""An output may be so many steps old; what is older counts as that."""
SAMPLE = 2048
"""Of each vector so many numbers are kept."""
LEAST_FELT = 0.05
"""How much an error is felt at least."""
BETTER = 1e-4
"""An exchange must make the error less by this share."""
ALL = -1
Guided = Callable[[list[tuple[str, torch.Tensor]]], torch.Tensor]


def measure_modules(
    run: Callable[[], torch.Tensor], pipe: Any, targets: tuple[Target, ...], guided: Guided, kinds: tuple[str, ...]
) -> np.ndarray:
    """float32 [steps, modules, ages, n]: what every module adds to the clip's error, by how old the output is that it
    reuses; 0 for ages that a step does not have. Modules are those of each layer in turn, in the order of `kinds`.

    Args:
        run: makes the clip whose latents it gives, the same one each time.
        guided: makes of outputs, by the name of their branch, that of the step.
    """
    watch = _Watch(targets, kinds)
    with ExitStack() as undo, accelerate(pipe, "none") as handle:
        watch.install(undo)
        handle.intercept(watch.probe)
        latents = run()
        sigmas = np.array([*handle.sigmas, 0.0])
    lengths = sigmas[:-1] - sigmas[1:]
    steps = len(lengths)
    vectors = np.zeros((steps, watch.modules, len(AGES), watch.sampled), np.float32)
    felt = np.zeros(steps)
    for step in range(1, steps):
        for column in range(watch.modules):
            for i, age in enumerate(AGES):
                if (found := watch.changes.get((step, column, age))) is not None:
                    vectors[step, column, i] = guided(found).flatten().numpy()
        drift = lengths[step] * guided(watch.whole[step]).double()
        with ExitStack() as undo, accelerate(pipe, "none") as handle:
            watch.install(undo)
            handle.intercept(watch.reuse_at(step))
            moved = (run() - latents).double().square().sum()
        felt[step] = max(LEAST_FELT, float(moved / drift.square().sum().clamp(min=1e-30)))
    return vectors * (lengths * np.sqrt(felt))[:, None, None, None].astype(np.float32)


def together(clips: list[np.ndarray]) -> np.ndarray:
    """float32 [clips, steps, modules, ages, n], in which each step counts as much as in the geometric mean of clips."""
    lengths = np.stack([np.sqrt(np.square(clip).mean((1, 2, 3))) for clip in clips]) + 1e-30  # [clips, steps]
    mean = np.exp(np.log(lengths).mean(0))
    return np.stack([clip * (mean / own)[:, None, None, None] for clip, own in zip(clips, lengths, strict=True)])


def best_modules(vectors: np.ndarray, reused: int) -> np.ndarray:
    """bool [steps, modules]: which to compute, if so many are reused. `vectors` is [clips, steps, modules, ages, n]."""
    steps, modules = vectors.shape[1:3]
    most = (steps - 1) * modules
    if not 0 <= reused <= most:
        raise ValueError(f"{reused} modules cannot be reused; of {steps} steps and {modules} modules {most} can")
    return _Exchange(_by_age(vectors), reused).run()


class _Watch:
    """Calls of transformers, in which modules give what they gave before."""

    def __init__(self, targets: tuple[Target, ...], kinds: tuple[str, ...]) -> None:
        layers = [target.family.modules(target.transformer) for target in targets]
        self._places = [
            (target.name, len(kinds) * layer + i, number, module)
            for target, rows in zip(targets, layers, strict=True)
            for layer, row in enumerate(rows)
            for i, kind in enumerate(kinds)
            for number, module in enumerate(row[kind])
        ]
        self.modules = len(kinds) * len(layers[0])
        self.sampled = 0
        self.changes: defaultdict[tuple[int, int, int], list[tuple[str, torch.Tensor]]] = defaultdict(list)
        """By step, module and age: of every branch, what reusing it changes of the output."""
        self.whole: defaultdict[int, list[tuple[str, torch.Tensor]]] = defaultdict(list)
        """By step: the same of reusing all modules of the step before, whole."""
        self._kept: dict[Any, Any] = {}
        self._outputs: dict[Any, Any] = {}
        self._now: tuple[str, str, int | None] = ("", "", None)
        self._reused: tuple[int, int] | None = None
        """Which module gives what it gave at which step; `ALL` modules."""
        self._index: torch.Tensor | None = None

    def install(self, undo: ExitStack) -> None:
        for name, column, number, module in self._places:
            undo.callback(wrap(module, "forward", self._around(name, column, number)))

    def _around(self, name: str, column: int, number: int) -> Callable[..., Any]:
        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            _, branch, step = self._now
            if self._reused is not None and self._reused[0] in (ALL, column):
                return self._kept[name, branch, self._reused[1], column, number]
            output = original(*args, **kwargs)
            if self._reused is None and step is not None:
                self._kept[name, branch, step, column, number] = output
            return output

        return call

    @torch.no_grad()
    def probe(self, name: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
        """See `Acceleration.intercept`: the pass itself, and one for each module and age."""
        self._now, self._reused = (name, branch, step), None
        output = compute()
        if step is None:
            return output
        self._outputs[name, branch, step] = output
        for age in AGES:
            if (name, branch, step - age) not in self._outputs:
                continue
            for column in (*range(self.modules), ALL) if age == 1 else range(self.modules):
                self._reused = (column, step - age)
                change = (compute()[0] - output[0]).float()
                if column == ALL:
                    self.whole[step].append((branch, change))
                else:
                    self.changes[step, column, age].append((branch, self._some(change)))
        for key in [key for key in self._kept if key[:2] == (name, branch) and key[2] <= step - AGES[-1]]:
            del self._kept[key]
        self._reused = None
        return output

    def reuse_at(self, where: int) -> Callable[[str, str, int | None, Callable[[], Any]], Any]:
        """Interceptor of the same clip: steps before are played, in this one all modules reuse the step before."""

        def call(name: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
            if step is not None and step < where - 1:
                return self._outputs[name, branch, step]
            self._now, self._reused = (name, branch, step if step == where - 1 else None), None
            if step == where and (name, branch, where - 1) in self._outputs:
                self._reused = (ALL, where - 1)
            output = compute()
            self._reused = None
            return output

        return call

    def _some(self, change: torch.Tensor) -> torch.Tensor:
        """[B, n]: the same numbers of every vector."""
        flat = change.flatten(1).cpu()
        if self._index is None:
            drawn = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))
            self._index = drawn[:SAMPLE].sort().values
            self.sampled = len(self._index)
        return flat[:, self._index]


def _by_age(vectors: np.ndarray) -> np.ndarray:
    """[clips, steps, modules, OLDEST + 1, n]: interpolated between measured ages; beyond the last it grows on."""
    clips, steps, modules, _, size = vectors.shape
    found = np.zeros((clips, steps, modules, OLDEST + 1, size), np.float32)
    for step in range(1, steps):
        known = [age for age in AGES if age <= step]
        for age in range(1, min(step, OLDEST) + 1):
            after = next((i for i, each in enumerate(known) if each >= age), None)
            if after is None:
                found[:, step, :, age] = vectors[:, step, :, len(known) - 1] * (age / known[-1])
            elif known[after] == age:
                found[:, step, :, age] = vectors[:, step, :, after]
            else:
                share = (age - known[after - 1]) / (known[after] - known[after - 1])
                before = vectors[:, step, :, after - 1]
                found[:, step, :, age] = before + share * (vectors[:, step, :, after] - before)
    return found


class _Exchange:
    """The table that is being changed, and what all steps lose under it."""

    def __init__(self, by_age: np.ndarray, reused: int) -> None:
        self._by_age = by_age
        clips, steps, modules, _, size = by_age.shape
        every = max(1, round(steps * modules / max(1, steps * modules - reused)))
        self._computed = np.zeros((steps, modules), bool)
        self._computed[::every] = True
        self._left = reused
        self._sums = np.zeros((clips, steps, size), np.float32)
        for step in range(1, steps):
            ages = self._ages_at(step)
            self._sums[:, step] = by_age[:, step, np.arange(modules), ages].sum(1)
        self._lengths = np.sqrt(np.square(self._sums).mean(2))

    def run(self) -> np.ndarray:
        while self._reused != self._left:
            self._flip(*self._best(compute=self._reused > self._left)[1:])
        error = self._error()
        if not 0 < self._left < self._computed[1:].size:  # there is but one such table
            return self._computed
        for _ in range(self._computed.size):
            before = self._computed.copy()
            _, step, module = self._best(compute=True)
            self._flip(step, module)
            now, step, module = self._best(compute=False)
            self._flip(step, module)
            if now >= error * (1 - BETTER):
                return before
            error = now
        return self._computed

    @property
    def _reused(self) -> int:
        return int((~self._computed).sum())

    def _ages_at(self, step: int) -> np.ndarray:
        """[modules]: how old what they use is."""
        since = [step - np.flatnonzero(column[: step + 1])[-1] for column in self._computed.T]
        return np.minimum(since, OLDEST)

    def _best(self, compute: bool) -> tuple[float, int, int]:
        """The module whose change costs least: one that is reused computed, or one that is computed reused."""
        return min(
            (self._changed(step, module)[0], step, module)
            for step, module in zip(*np.nonzero(self._computed != compute), strict=True)
            if step
        )

    def _changed(self, step: int, module: int) -> tuple[float, np.ndarray, np.ndarray]:
        """The error if a module is changed at a step; sums and lengths of the steps until it is next computed."""
        column = self._computed[:, module]
        later = np.flatnonzero(column[step + 1 :])
        stop = step + 1 + int(later[0]) if len(later) else len(column)
        steps = np.arange(step, stop)
        last = int(np.flatnonzero(column[:step])[-1])
        from_here, from_before = steps - step, steps - last
        old, new = (from_here, from_before) if column[step] else (from_before, from_here)
        old, new = (np.minimum(each, OLDEST) for each in (old, new))
        sums = self._sums[:, steps] + self._by_age[:, steps, module, new] - self._by_age[:, steps, module, old]
        lengths = np.sqrt(np.square(sums).mean(2))
        total = self._sums.sum(1) + (sums - self._sums[:, steps]).sum(1)
        summed = self._lengths.sum(1) + (lengths - self._lengths[:, steps]).sum(1)
        return _error(total, summed), sums, lengths

    def _flip(self, step: int, module: int) -> None:
        _, sums, lengths = self._changed(step, module)
        steps = slice(step, step + sums.shape[1])
        self._sums[:, steps], self._lengths[:, steps] = sums, lengths
        self._computed[step, module] = not self._computed[step, module]

    def _error(self) -> float:
        return _error(self._sums.sum(1), self._lengths.sum(1))


def _error(sums: np.ndarray, lengths: np.ndarray) -> float:
    """Of the clip, mean over clips: half of what sums of vectors [clips, n] make, half of what lengths [clips] do."""
    return float((np.square(sums).mean(1) + np.square(lengths)).mean() / 2)
