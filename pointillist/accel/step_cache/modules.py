"""Carrying a `CacheTable` out in one transformer: a module is computed, or what it gave before stands in."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from pointillist.accel.memory import check_fits, held_bytes
from pointillist.accel.run_state import wrap
from pointillist.accel.site import Runtime, before_sparse
from pointillist.accel.step_cache.predictors import PREDICTORS
from pointillist.accel.step_cache.table import CacheTable

Layers = list[dict[str, list[torch.nn.Module]]]
"""Of every layer the modules of each of `KINDS`."""


class ModuleCache:
    """Of one transformer. All that it remembers lies in the runtime's memory, by module, branch and generation."""

    def __init__(
        self, table: CacheTable, runtime: Runtime, name: str, layers: Layers, branches: Callable[[str], int]
    ) -> None:
        """`branches`: how many guidance passes a step has, by the name of the first."""
        self._branches = branches
        self._table, self._runtime, self._name, self._layers = table, runtime, name, layers
        self._kept, self._predict = PREDICTORS[table.predictor]
        self._computed = self._reused = 0

    def install(self) -> Callable[[], None]:
        """Returns the undo."""
        with ExitStack() as undo:
            for layer, kinds in enumerate(self._layers):
                for kind, modules in kinds.items():
                    for number, module in enumerate(modules):
                        place = f"{self._name}.{layer}.{kind}.{number} cache"
                        around = functools.partial(self._call, layer, kind, place)
                        undo.callback(wrap(module, "forward", torch.compiler.disable(around)))
            return undo.pop_all().close

    def enter(self) -> None:
        """A call of the transformer begins."""
        self._computed = self._reused = 0

    def leave(self, failed: bool) -> None:
        """It has ended."""
        state, record = self._runtime.state, self._runtime.record
        if failed or state.step is None:
            return
        record.decisions.append((state.step, state.branch, not self._computed, None))
        computed, reused = record.modules or (0, 0)
        record.modules = (computed + self._computed, reused + self._reused)
        record.held["step cache"] = max(record.held.get("step cache", 0), self._runtime.held(" cache"))

    def _call(self, layer: int, kind: str, place: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a module's forward pass."""
        state = self._runtime.state
        if state.step is None:
            return original(*args, **kwargs)
        x = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        memory = self._runtime.memory(place, (x.shape, x.dtype, x.device))
        history = memory.setdefault("history", [])
        position = state.sigmas[state.step]
        if history and not self._must_compute(layer, kind):
            self._reused += 1
            return _like(history[-1][1], [self._predict(each, position) for each in _streams(history)])
        output = original(*args, **kwargs)
        self._computed += 1
        self._check_memory(output)
        history.append((position, output))
        del history[: -self._kept]
        return output

    def _check_memory(self, output: Any) -> None:
        """Once in each branch: all modules are taken to give as much as this one. Raises MemoryRefusedError."""
        runtime, place = self._runtime, f"{self._name} modules' memory"
        memory = runtime.memory(place, None)
        if "needed" in memory:
            return
        branches = max(self._branches(runtime.state.branch), runtime.branches(place))
        modules = sum(len(each) for kinds in self._layers for each in kinds.values())
        one = branches * modules * held_bytes(output)
        memory["needed"] = runtime.record.predicted["step cache"] = self._kept * one
        ways: dict[str, int | None] = {"predictor last": one} if self._kept > 1 else {}
        device = output.device if isinstance(output, torch.Tensor) else output[0].device
        check_fits(
            f"the cache table keeps {self._kept} outputs of {modules} modules and {branches} guidance branches",
            memory["needed"] - runtime.held(" cache"), device, ways | {"cache='easy' keeps one residual": None},
        )  # fmt: skip

    def _must_compute(self, layer: int, kind: str) -> bool:
        state, plan = self._runtime.state, self._runtime.plan
        assert state.step is not None
        if self._table.computes(state.step, layer, kind):
            return True
        learns = kind == "attention" and plan is not None and plan.schedule.kind(state.step, state.sigmas) == "dense"
        return learns and before_sparse(plan, state)  # type: ignore[arg-type]  # patterns look at this step


def _streams(history: list[tuple[float, Any]]) -> list[list[tuple[float, torch.Tensor]]]:
    """Positions and tensors of each stream that the module gives, for models whose text is a stream of its own."""
    if isinstance(history[-1][1], torch.Tensor):
        return [history]
    return [[(at, output[i]) for at, output in history] for i in range(len(history[-1][1]))]


def _like(output: Any, streams: list[torch.Tensor]) -> Any:
    return streams[0] if isinstance(output, torch.Tensor) else tuple(streams)
