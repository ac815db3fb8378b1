"""`accelerate`: install a plan in a pipeline, report what ran, restore."""

import os
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from pointillist.accel import bridge
from pointillist.accel.choose_plan import Choice, choose_plan
from pointillist.accel.conflicts import Target, check_arguments, targets_of
from pointillist.accel.dense import DenseAttention
from pointillist.accel.layouts import forget_layouts
from pointillist.accel.plan import Plan
from pointillist.accel.report import Record, Report, make_report
from pointillist.accel.run_state import watch_branches, watch_generations
from pointillist.accel.site import Runtime, Site
from pointillist.accel.timing import now


def accelerate(
    pipe: Any,
    plan: Plan | str | os.PathLike[str] = "auto",
    cache: str | None = "auto",
    regions: str | None = "auto",
    backend: str = "auto",
    dense: str = "auto",
) -> "Acceleration":
    """Make the self-attention of a Diffusers pipeline follow a plan. The pipeline is used as before.

    Args:
        pipe: a pipeline whose transformers are supported, not yet compiled (compile after this call).
        plan: `auto`, `none` (nothing changes, only measured), a `Plan`, or the path of a plan file.
        cache, regions: `auto` or `none`; no plan of this version says anything about either.
        backend: of sparse calls: `auto`, or a name from `pointillist.kernels.available_backends`.
        dense: of dense calls: `auto` (what the pipeline asks for), the name of one of Diffusers' attention backends
            (`native`, `_native_cudnn`, `flash`, `sage`, `xformers` …), or `fastest`: measured at the first dense call.

    Returns:
        A handle with `report()` and `restore()`; as a context manager it restores on leaving.

    Raises:
        AccelerateError: something does not fit; nothing has been changed then.
        PlanError: the file is not a plan.
    """
    targets = targets_of(pipe)
    check_arguments(pipe, cache, regions, backend, dense)
    return Acceleration(pipe, targets, choose_plan(plan, targets), backend, dense)


class Acceleration:
    """The handle of an accelerated pipeline."""

    def __init__(self, pipe: Any, targets: tuple[Target, ...], choice: Choice, backend: str, dense: str) -> None:
        self._pipe = pipe
        self._choice = choice
        self._targets = targets
        self._runtime = Runtime(choice.plan, backend)
        self._dense = DenseAttention(dense)
        self._device = torch.device("cpu")
        self._undo = ExitStack()
        with ExitStack() as undo:  # undoes all of it if one installation fails
            self._watch_scheduler()
            undo.callback(lambda: self._unwatch_scheduler())
            for target in targets:
                self._install(target, undo)
            undo.callback(forget_layouts)
            self._undo = undo.pop_all()

    def report(self) -> Report:
        """What really ran in the last generation. Waits for the device."""
        plan = self._choice.plan
        return make_report(
            self._runtime.record,
            plan="none" if plan is None else plan.name,
            plan_source=self._plan_source(),
            dense_backend=self._dense.choice,
        )

    def restore(self) -> None:
        """Undo everything: the next output is that of a pipeline never touched. May be called twice."""
        self._undo.close()

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _install(self, target: Target, undo: ExitStack) -> None:
        state, family, transformer = self._runtime.state, target.family, target.transformer

        @torch.compiler.disable
        def entered(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._pipe.scheduler is not self._scheduler:
                self._follow_scheduler()
            hidden_states, timestep = family.inputs(args, kwargs)
            state.enter(target.name, timestep, family.grid(transformer, hidden_states))
            self._call_began(hidden_states.device)

        @torch.compiler.disable
        def left(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            state.leave()

        undo.callback(watch_branches(transformer, state))
        undo.callback(transformer.register_forward_pre_hook(entered, with_kwargs=True).remove)
        undo.callback(transformer.register_forward_hook(left, always_call=True).remove)
        for layer, (block, attention) in enumerate(family.sites(transformer)):
            name = f"{target.name}.{family.site_name(layer)}"
            site = Site(name, layer, self._dense.handler(attention), self._runtime)
            undo.callback(bridge.route(block, attention, site))

    def _watch_scheduler(self) -> None:
        self._scheduler = self._pipe.scheduler
        self._unwatch_scheduler = watch_generations(self._scheduler, self._generation_began, self._step_ended)

    def _follow_scheduler(self) -> None:
        """The user has given the pipeline another scheduler, which has already set its steps."""
        self._unwatch_scheduler()
        self._watch_scheduler()
        self._generation_began(self._scheduler)

    def _generation_began(self, scheduler: Any) -> None:
        self._runtime.state.begin_generation(scheduler)
        self._runtime.record = Record()

    def _call_began(self, device: torch.device) -> None:
        record = self._runtime.record
        self._device = device
        record.grid = self._runtime.state.grid
        if record.first_call is None:
            record.first_call = now(device)
        for target in self._targets:
            strays = sum(not bridge.is_routed(attention) for _, attention in target.family.sites(target.transformer))
            if strays:
                record.fallbacks[f"dense: {strays} sites of {target.name} got another processor or backend"] += 1

    def _step_ended(self) -> None:
        self._runtime.record.last_step = now(self._device)

    def _plan_source(self) -> str:
        plan, grid = self._choice.plan, self._runtime.record.grid
        if plan is None or plan.grid is None or grid is None or plan.grid == grid:
            return self._choice.source
        made_for, here = ("×".join(map(str, each)) for each in (plan.grid, grid))
        return f"{self._choice.source}; carried over from the grid {made_for} to {here}"
