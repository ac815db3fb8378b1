"""`RunState`: where in a generation we are, derived from what the pipeline does."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pointillist.accel.models.family import Tokens
from pointillist.accel.tiles import Grid


class RunState:
    """A generation begins with `set_timesteps`; the rest is read off each transformer call."""

    def __init__(self) -> None:
        self.sigmas: tuple[float, ...] = ()
        """Of all steps of the generation, noisiest first, in the scheduler's units."""
        self.step: int | None = None
        """Index into `sigmas` of the running transformer call; None outside of a generation."""
        self.branch = ""
        """Guidance pass of the running call: the `cache_context`, else the call's place within the step."""
        self.expert = ""
        """Component name of the running transformer."""
        self.tokens: Tokens | None = None
        """Of the running call, None between calls."""
        self.call: object = None
        """Another one in every transformer call."""
        self.thread: int | None = None
        self.was_last_step = False
        """The last transformer call was of the generation's last step."""
        self._context: str | None = None
        self._timesteps: torch.Tensor | None = None
        self._scheduler: Any = None
        self._done = 0
        self._unnamed: tuple[tuple[str, int | None], int] = (("", None), 0)

    def begin_generation(self, scheduler: Any) -> None:
        """Take over the steps that `scheduler` has just set; what an earlier generation left is dropped."""
        self._timesteps, self._done, self._scheduler = torch.as_tensor(scheduler.timesteps), 0, scheduler
        levels = getattr(scheduler, "sigmas", None)
        count = len(self._timesteps)
        usable = levels is not None and len(levels) >= count
        self.sigmas = tuple(float(level) for level in torch.as_tensor(levels if usable else self._timesteps)[:count])
        if scheduler.config.get("invert_sigmas"):  # Mochi's run from 0 to 1
            self.sigmas = tuple(1 - level for level in self.sigmas)
        self._unnamed = (("", None), 0)
        self.leave()

    def stepped(self) -> None:
        """The scheduler has taken a step."""
        self._done += 1

    @property
    def sigma(self) -> float:
        """Of the running step."""
        assert self.step is not None, "outside of a generation there is no step"
        return self.sigmas[self.step]

    @property
    def grid(self) -> Grid | None:
        """Token grid of the running call, None between calls."""
        return None if self.tokens is None else self.tokens.grid

    def enter(self, expert: str, timestep: torch.Tensor | None, tokens: Tokens) -> None:
        """A transformer call begins; without a timestep, at the step where the scheduler is."""
        self.expert, self.tokens, self.thread, self.call = expert, tokens, threading.get_ident(), object()
        self.step = self._step_of(timestep) if timestep is not None else self._next_step()
        self.was_last_step = self.step is not None and self.step == len(self.sigmas) - 1
        self.branch = self._context if self._context is not None else self._place_within_step()

    def leave(self) -> None:
        """A transformer call has ended, well or not."""
        self.step, self.branch, self.expert, self.tokens, self.thread = None, "", "", None, None

    @contextlib.contextmanager
    def context(self, name: str) -> Iterator[None]:
        """The calls inside belong to the guidance branch `name`."""
        outer, self._context = self._context, name
        try:
            yield
        finally:
            self._context = outer

    def _next_step(self) -> int | None:
        """Where the scheduler says it is; else as many steps as it has taken, from where the pipeline began."""
        step = getattr(self._scheduler, "step_index", None)
        if step is None:
            step = (getattr(self._scheduler, "begin_index", None) or 0) + self._done
        return step if step < len(self.sigmas) else None

    def _step_of(self, timestep: torch.Tensor) -> int | None:
        """The index of `timestep` in the scheduler's list; None if it is not in it.

        Pipelines pass views of that list, and then the place in memory tells the index without waiting for
        the device. Other values are looked up; a tolerance of 0.5 % allows for rounding to bfloat16.
        """
        known = self._timesteps
        if known is None or not len(known):
            return None
        if (
            timestep.dtype == known.dtype
            and timestep.untyped_storage().data_ptr() == known.untyped_storage().data_ptr()
        ):
            return (timestep.storage_offset() - known.storage_offset()) // max(known.stride(0), 1)
        value = float(timestep.max())
        distances = (known.to("cpu", torch.float64) - value).abs()
        step = int(distances.argmin())
        return step if float(distances[step]) <= 0.005 * float(known.abs().max()) else None

    def _place_within_step(self) -> str:
        """Names a call by its order among the calls of one transformer at one step."""
        here = (self.expert, self.step)
        seen, calls = self._unnamed
        calls = calls + 1 if seen == here else 0
        self._unnamed = (here, calls)
        return f"call {calls}"


Undo = Callable[[], None]


def watch_generations(scheduler: Any, began: Callable[[Any], None], stepped: Callable[[], None]) -> Undo:
    """Call `began(scheduler)` after each `set_timesteps` and `stepped()` after each `step`. Returns the undo.

    Only this instance is changed, and signatures stay visible: pipelines inspect them.
    """

    def set_timesteps(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        began(scheduler)
        return result

    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        stepped()
        return result

    undo_set_timesteps = wrap(scheduler, "set_timesteps", set_timesteps)
    undo_step = wrap(scheduler, "step", step)

    def undo() -> None:
        undo_step()
        undo_set_timesteps()

    return undo


def watch_branches(transformer: Any, state: RunState) -> Undo:
    """Read the guidance branch off the transformer's `cache_context`, if it has one. Returns the undo."""
    if not hasattr(transformer, "cache_context"):
        return lambda: None

    @contextlib.contextmanager
    def cache_context(original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with original(name, *args, **kwargs), state.context(name):
            yield

    return wrap(transformer, "cache_context", cache_context)


class _Wrapper:
    """What stands in place of a method of one instance. Wrappers of several owners may be undone in any order."""

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        functools.update_wrapper(self, original)  # and all that another wrapper knows, so this comes first
        self._owner, self._name, self._around, self._original = owner, name, around, original
        self.earlier = vars(owner).get(name)
        """What the instance itself held before, None for the method of its class."""
        self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._original, *args, **kwargs) if self.active else self._original(*args, **kwargs)

    def __deepcopy__(self, known: dict[int, Any]) -> Any:
        """A copy of the owner gets its own method, and is not watched: LTX-2 copies its scheduler for the audio."""
        copied = known.get(id(self._owner))
        return getattr(type(copied), self._name).__get__(copied) if copied is not None else self


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> Undo:
    """Replace the method `name` of this instance by `around(original, …)`. Returns the undo."""
    wrapper = _Wrapper(owner, name, around)
    setattr(owner, name, wrapper)

    def undo() -> None:
        wrapper.active = False
        method = vars(owner).get(name)
        while isinstance(method, _Wrapper) and not method.active:
            method = method.earlier
        if method is None:
            vars(owner).pop(name, None)
        elif method is not vars(owner).get(name):  # else somebody has wrapped ours, and calls through it
            setattr(owner, name, method)

    return undo
