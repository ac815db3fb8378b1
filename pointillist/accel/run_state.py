"""Where a run stands: generation, step, sigma, branch, transformer, token grid. All of it is derived.

A generation begins when the scheduler's `set_timesteps` is called; the step is the scheduler's own index; the branch
is the name of the transformer's `cache_context`.
"""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from typing import Any

import torch

from pointillist.accel.tiles import Grid


class RunState:
    """Derived state of one pipeline's run. `install()` observes the scheduler and the transformers; `remove()` undoes it."""

    def __init__(self, pipe: Any, transformers: dict[str, Any]) -> None:
        self.generation = 0
        self.sigmas: tuple[float, ...] = ()
        self.transformer = ""
        self.branch = ""
        self.step = 0
        self.grid: Grid = (0, 0, 0)
        self.started: float | None = None
        self.finished: float | None = None
        self._pipe = pipe
        self._transformers = transformers
        self._scheduler: Any = None
        self._context: str | None = None
        self._unnamed_calls: dict[tuple[str, int], int] = {}
        self._hooks: list[Any] = []

    def install(self, token_grid: Any) -> None:
        """Begin to observe. `token_grid(transformer, hidden_states)` is the model family's."""
        self._watch_scheduler()
        for name, transformer in self._transformers.items():
            transformer.cache_context = self._named_context(transformer.cache_context)
            self._hooks.append(
                transformer.register_forward_pre_hook(
                    functools.partial(self._enter, name, token_grid), with_kwargs=True
                )
            )

    def remove(self) -> None:
        """Stop observing and leave no trace."""
        for hook in self._hooks:
            hook.remove()
        for transformer in self._transformers.values():
            vars(transformer).pop("cache_context", None)
        self._unwatch_scheduler()

    @property
    def sigma(self) -> float:
        """Noise level of the current step; NaN where the scheduler has no sigmas."""
        return self.sigmas[self.step] if self.step < len(self.sigmas) else float("nan")

    def begin_generation(self) -> None:
        """A new call of the pipeline: nothing of the earlier one is left."""
        self.generation += 1
        steps = len(self._scheduler.timesteps)
        sigmas = getattr(self._scheduler, "sigmas", None)
        self.sigmas = tuple(float(s) for s in sigmas[:steps]) if sigmas is not None else ()
        self.started = self.finished = None
        self._unnamed_calls.clear()

    def _enter(self, name: str, token_grid: Any, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._pipe.scheduler is not self._scheduler:  # the user has changed the scheduler since
            self._unwatch_scheduler()
            self._watch_scheduler()
            self.begin_generation()
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self.started is None:
            _synchronize(hidden_states.device)
            self.started = time.perf_counter()
        index = getattr(self._scheduler, "step_index", None)
        self.step = index if index is not None else (getattr(self._scheduler, "begin_index", None) or 0)
        self.transformer = name
        self.grid = token_grid(transformer, hidden_states)
        self.branch = self._context if self._context is not None else self._unnamed_branch(name)

    def _unnamed_branch(self, name: str) -> str:
        """Without a context, branches are told apart by their order within one step."""
        key = (name, self.step)
        order = self._unnamed_calls.get(key, 0)
        self._unnamed_calls[key] = order + 1
        return f"call {order}"

    def _named_context(self, original: Any) -> Any:
        @functools.wraps(original)
        @contextmanager
        def cache_context(name: str, **kwargs: Any):
            self._context = name
            try:
                with original(name, **kwargs):
                    yield
            finally:
                self._context = None

        return cache_context

    def _watch_scheduler(self) -> None:
        scheduler = self._scheduler = self._pipe.scheduler
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        @functools.wraps(set_timesteps)
        def watched_set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            self.begin_generation()
            return result

        @functools.wraps(step)
        def watched_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if scheduler.step_index is None or scheduler.step_index >= len(scheduler.timesteps):
                sample = result[0] if isinstance(result, tuple) else result.prev_sample
                _synchronize(sample.device)
            self.finished = time.perf_counter()
            return result

        scheduler.set_timesteps, scheduler.step = watched_set_timesteps, watched_step

    def _unwatch_scheduler(self) -> None:
        for name in ("set_timesteps", "step"):
            vars(self._scheduler).pop(name, None)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
