"""`accelerate`: install a plan in a pipeline, report what ran, restore."""

import functools
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from pointillist.accel import bridge
from pointillist.accel.blocks import blocks_in, places_in
from pointillist.accel.choose_plan import Choice, choose_plan, with_caching, with_regions
from pointillist.accel.conflicts import (
    AccelerateError,
    Setup,
    Target,
    check_arguments,
    check_setup,
    doubts,
    inert,
    targets_of,
)
from pointillist.accel.dense import DenseAttention
from pointillist.accel.layouts import forget_layouts
from pointillist.accel.memory import branches_of
from pointillist.accel.parallel.split import Split, agreement_of, config_of
from pointillist.accel.patterns import pattern_class
from pointillist.accel.plan import Plan
from pointillist.accel.regions.keys import Recomputing
from pointillist.accel.regions.policy import Regions
from pointillist.accel.regions.rows import RegionSampling
from pointillist.accel.report import Record, Report, make_report
from pointillist.accel.run_state import watch_branches, watch_generations, wrap
from pointillist.accel.site import LayoutObserver, Observer, Runtime, Site
from pointillist.accel.step_cache.modules import ModuleCache
from pointillist.accel.step_cache.policy import Caching, CachingError
from pointillist.accel.step_cache.stack import StepCache
from pointillist.accel.step_cache.table import CacheTable, MadeFor, shift_of
from pointillist.accel.tiles import Grid
from pointillist.accel.timing import now
from pointillist.accel.trained import check_keys, load_weights, watch_hidden_states, weights_of

Interceptor = Callable[[str, str, int | None, Callable[[], Any]], Any]


def accelerate(
    pipe: Any,
    plan: Plan | str | os.PathLike[str] = "auto",
    cache: Caching | CacheTable | str | None = "auto",
    regions: Regions | str | None = "auto",
    backend: str = "auto",
    dense: str = "auto",
    weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | None = None,
) -> "Acceleration":
    """Make the self-attention of a Diffusers pipeline follow a plan. The pipeline is used as before.

    Args:
        pipe: a pipeline whose transformers are supported, not yet compiled (compile after this call).
        plan: `auto`, `none` (nothing changes, only measured), a `Plan`, the path of a plan file, or `quality`,
            `balanced` or `fast`, which `auto` is.
        cache: `auto` (what the plan says), `none`, `easy` (needs no plan and no calibration), a `Caching`, or one in
            words, like `first_block:threshold=0.1,predictor=taylor`. A `CacheTable` reuses modules in place of steps:
            `table:FILE` is one in a file, and `table` the one that is shipped for the model.
        regions: `auto` (what the plan says), `none`, `easy` (two of three steps compute 30 % of the tokens), a
            `Regions`, or one in words, like `change:share=0.25,every=4`.
        backend: of sparse calls: `auto`, or a name from `pointillist.kernels.available_backends`.
        dense: of dense calls: `auto` (what the pipeline asks for), the name of one of Diffusers' attention backends
            (`native`, `_native_cudnn`, `flash`, `sage`, `xformers` …), or `fastest`: measured at the first dense call.
        weights: for patterns that are trained (`sla`, `vsa`, `seer`): a safetensors file, or a mapping, with what the
            pipeline has not loaded. Keys like `blocks.3.attn1.proj_l.weight`: see `accel/trained.py`.

    Returns:
        A handle with `report()` and `restore()`; as a context manager it restores on leaving.

    Raises:
        AccelerateError: something does not fit; nothing has been changed then.
        PlanError: the file is not a plan.
    """
    targets = targets_of(pipe, sparse=plan != "none")
    check_arguments(pipe, backend, dense)
    choice = with_caching(with_regions(choose_plan(plan, targets), regions, cache), cache, targets)
    setup = Setup(pipe, targets, choice.plan, choice.caching, choice.table)
    warnings = check_setup(setup)
    return Acceleration(setup, warnings, choice, backend, dense, _weights(weights, targets))


class Acceleration:
    """The handle of an accelerated pipeline."""

    def __init__(
        self,
        setup: Setup,
        warnings: tuple[str, ...],
        choice: Choice,
        backend: str,
        dense: str,
        weights: Mapping[str, torch.Tensor],
    ) -> None:
        self._setup, self._warnings = setup, warnings
        self._pipe, self._targets = setup.pipe, setup.targets
        self._choice = choice
        self._runtime = Runtime(choice.plan, backend)
        self._dense = DenseAttention(dense)
        self._weights = weights
        self._device = torch.device("cpu")
        self._undo = ExitStack()
        with ExitStack() as undo:  # undoes all of it if one installation fails
            self._watch_scheduler()
            undo.callback(lambda: self._unwatch_scheduler())
            branches = functools.partial(branches_of, self._pipe)
            self._caches = _caches(choice, self._runtime, self._targets, branches)
            self._tables = _tables(choice, self._runtime, self._targets, self._pipe, branches)
            self._regions = _regions(choice, self._runtime, self._targets, branches)
            self._splits = _splits(self._runtime, self._targets, undo)
            for target in self._targets:
                self._install(target, undo)
            undo.callback(forget_layouts)
            undo.callback(self._runtime.forget)
            self._undo = undo.pop_all()
        self._runtime.record = self._new_record()

    def report(self) -> Report:
        """What really ran in the last generation. Waits for the device."""
        plan = self._choice.plan
        return make_report(
            self._runtime.record,
            plan="none" if plan is None else plan.name,
            plan_source=self._plan_source(),
            dense_backend=self._dense.choice,
        )

    @property
    def grid(self) -> Grid | None:
        """The token grid of the last transformer call of this generation."""
        return self._runtime.record.grid

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Of the steps of this generation, noisiest first, in the scheduler's units."""
        return self._runtime.state.sigmas

    def observe(self, observer: Observer | None) -> None:
        """Call `observer(site, branch, step, q, k, v, out)`, tensors [B, S, H, D], at every attention call from now on;
        None ends it. The tensors may be reused after the call: clone what is to be kept. A tensor that it returns takes
        the place of out."""
        self._runtime.observer = observer

    def observe_layouts(self, observer: LayoutObserver | None) -> None:
        """Call `observer(site, branch, step, laid)` at every sparse attention call from now on, before it is computed;
        None ends it. `laid.layout` says which pairs of blocks the call keeps. Steps that compute a part of the tokens
        are not told."""
        self._runtime.layout_observer = observer

    def intercept(self, intercept: Interceptor) -> None:
        """From now on, call `intercept(transformer, branch, step, compute)` in place of every call of a transformer, by
        its component name: `compute()` is the model's own forward pass, and what is returned is its output."""
        state = self._runtime.state

        def of(name: str) -> Callable[..., Any]:
            def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                return intercept(name, state.branch, state.step, lambda: original(*args, **kwargs))

            return forward

        for target in self._targets:
            self._undo.callback(wrap(target.transformer, "forward", of(target.name)))

    def compute_only(self, tokens: torch.Tensor | None) -> None:
        """From now on, region steps compute these tokens of the grid, int64 [n], in place of those that matter; None
        ends it. Which steps are region steps is the schedule's to say. Raises AccelerateError where it has none."""
        if not self._regions:
            raise AccelerateError("there are no region steps to compute tokens in; give accelerate(regions=…)")
        if tokens is not None and (tokens.dtype != torch.int64 or tokens.ndim != 1 or not len(tokens)):
            raise AccelerateError(f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be int64 [n], not empty")
        for regions in self._regions.values():
            regions.fixed = tokens

    def watch_velocities(self, tell: Callable[[torch.Tensor], None]) -> None:
        """From now on, call `tell(velocity)` in every step with what the scheduler is given: the guided output of the
        transformer, in the shape of the latents. It may be reused after the call: clone what is to be kept."""

        def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            tell(args[0] if args else kwargs["model_output"])
            return original(*args, **kwargs)

        self._undo.callback(wrap(self._pipe.scheduler, "step", step))

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
        plan, cache, regions = self._choice.plan, self._caches.get(target.name), self._regions.get(target.name)
        table, split = self._tables.get(target.name), self._splits.get(target.name)

        @torch.compiler.disable
        def entered(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._pipe.scheduler is not self._scheduler:
                self._follow_scheduler()
            call = family.named(transformer, args, kwargs)
            hidden_states, tokens = family.latents(call), family.tokens(transformer, call)
            state.enter(target.name, family.timestep(call), tokens)
            self._call_began(hidden_states.device)
            if split is not None:
                split.enter(args, kwargs)
            if regions is not None:
                regions.enter(hidden_states)
            if cache is not None:
                cache.enter(hidden_states)
            if table is not None:
                table.enter()

        @torch.compiler.disable
        def left(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            reused = cache is not None and cache.leave(output)
            if table is not None:
                table.leave(failed=output is None)
            if regions is not None:
                regions.leave(reused)
            if split is not None:
                split.leave()
            state.leave()

        undo.callback(watch_branches(transformer, state))
        if split is not None:
            undo.callback(split.install())
        if regions is not None:
            undo.callback(regions.install())
        if cache is not None:
            cache.seam = None if split is None else split.seam
            undo.callback(cache.install())
            undo.callback(family.watch_modulation(transformer, cache.modulated))
        if table is not None:
            undo.callback(table.install())
        undo.callback(transformer.register_forward_pre_hook(entered, with_kwargs=True).remove)
        undo.callback(transformer.register_forward_hook(left, always_call=True).remove)
        sites: dict[torch.nn.Module, Site] = {}
        named = zip(family.site_names(transformer), family.sites(transformer), strict=True)
        for layer, (path, (block, attention)) in enumerate(named):
            name = f"{target.name}.{path}"
            trained = weights_of(attention, name, self._weights)
            sites[attention] = Site(name, layer, family, self._dense.handler(attention), self._runtime, trained)
            handler = sites[attention] if split is None else split.share(sites[attention], layer)
            undo.callback(bridge.route(block, attention, handler))
            if regions is not None and self._runtime.keeps_how[layer] == "input":
                again = torch.compiler.disable(Recomputing(self._runtime, f"{name} keys").around)
                undo.callback(wrap(attention, "forward", again))
        if plan is not None and plan.hoist:

            def order() -> tuple[torch.Tensor, torch.Tensor]:
                assert state.grid is not None
                shape = (plan.hoist, state.grid, plan.block, self._device)
                return blocks_in(*shape).order[0, 0], places_in(*shape)

            undo.callback(family.hoist(transformer, order))
        if _asks_for_hidden_states(self._choice.plan):
            undo.callback(watch_hidden_states(sites))

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
        self._runtime.forget()
        _check_table(self._choice, self._targets, self._pipe, len(self._runtime.state.sigmas))
        for split in self._splits.values():
            split.begin_generation()
        self._runtime.record = self._new_record()

    def _new_record(self) -> Record:
        record = Record(caching=str(self._choice.caching or self._choice.table or ""))
        record.warnings.extend(self._warnings)
        if self._choice.table is not None:
            record.warnings.extend(self._choice.table.doubts(_here(self._choice, self._targets[0], self._pipe)))
        steps = len(self._runtime.state.sigmas)
        if steps:
            record.warnings.extend(doubts(self._setup, steps))
        if steps and (why := inert(self._setup, steps)):
            record.warnings.append(why)
        return record

    def _call_began(self, device: torch.device) -> None:
        record = self._runtime.record
        self._device = device
        record.grid = self._runtime.state.grid
        if record.first_call is None:
            record.first_call = now(device)
        for target in self._targets:
            strays = sum(not bridge.is_routed(attention) for _, attention in target.family.sites(target.transformer))
            if strays:
                record.notes[f"dense: {strays} sites of {target.name} got another processor or backend"] += 1

    def _step_ended(self) -> None:
        self._runtime.state.stepped()
        self._runtime.record.step_ends.append(now(self._device))
        if self._runtime.state.was_last_step:
            self._runtime.forget()
            if self._splits:
                next(iter(self._splits.values())).end_generation()

    def _plan_source(self) -> str:
        plan, grid = self._choice.plan, self._runtime.record.grid
        if plan is None or plan.grid is None or grid is None or plan.grid == grid:
            return self._choice.source
        made_for, here = ("×".join(map(str, each)) for each in (plan.grid, grid))
        shorter = math.prod(grid) < math.prod(plan.grid)
        how = "as many keys for a query" if shorter else "the same densities"
        return f"{self._choice.source}; carried over from the grid {made_for} to {here} with {how}"


def _caches(
    choice: Choice, runtime: Runtime, targets: tuple[Target, ...], branches: Callable[[str], int]
) -> dict[str, StepCache]:
    """By component name. Raises AccelerateError where a model lacks what the cache needs."""
    if choice.caching is None:
        return {}
    try:
        return {
            each.name: StepCache(
                choice.caching,
                runtime,
                each.name,
                each.transformer,
                each.family.fingerprint(each.transformer),
                branches,
            )
            for each in targets
        }
    except CachingError as error:
        raise AccelerateError(str(error)) from error


def _tables(
    choice: Choice, runtime: Runtime, targets: tuple[Target, ...], pipe: Any, branches: Callable[[str], int]
) -> dict[str, ModuleCache]:
    """By component name. Raises AccelerateError where a model is not the table's."""
    if choice.table is None:
        return {}
    _check_table(choice, targets, pipe)
    return {
        each.name: ModuleCache(choice.table, runtime, each.name, each.family.modules(each.transformer), branches)
        for each in targets
    }


def _check_table(choice: Choice, targets: tuple[Target, ...], pipe: Any, steps: int | None = None) -> None:
    """Raises AccelerateError for a table of another model, scheduler or, once it is known, number of steps."""
    if choice.table is None:
        return
    try:
        for target in targets:
            layers = len(target.family.modules(target.transformer))
            choice.table.check_fits(_here(choice, target, pipe), layers, steps)
    except ValueError as error:
        raise AccelerateError(str(error)) from error


def _here(choice: Choice, target: Target, pipe: Any) -> MadeFor:
    """What a table would have to be made for."""
    return MadeFor(
        model=target.family.fingerprint(target.transformer),
        scheduler=type(pipe.scheduler).__name__,
        shift=shift_of(pipe.scheduler),
        guided=getattr(pipe, "do_classifier_free_guidance", None) if hasattr(pipe, "_guidance_scale") else None,
        plan="none" if choice.plan is None else choice.plan.name,
    )


def _regions(
    choice: Choice, runtime: Runtime, targets: tuple[Target, ...], branches: Callable[[str], int]
) -> dict[str, RegionSampling]:
    """By component name; none where the plan has no region steps."""
    plan = choice.plan
    if plan is None or plan.regions is None:
        return {}
    runtime.keeps_how = plan.regions.keeps(max(len(each.family.sites(each.transformer)) for each in targets))
    runtime.kept_steps = plan.regions.kept_steps
    return {
        each.name: RegionSampling(plan.regions, runtime, each.name, each.family, each.transformer, branches)
        for each in targets
    }


def _splits(runtime: Runtime, targets: tuple[Target, ...], undo: ExitStack) -> dict[str, Split]:
    """By component name; none where one process has a video for itself. Raises AccelerateError."""
    configs = {each.name: config for each in targets if (config := config_of(each.transformer)) is not None}
    if not configs:
        return {}
    try:
        splits = {
            each.name: Split(each.transformer, configs[each.name], each.family.heads(each.transformer), runtime)
            for each in targets
        }
    except ValueError as error:
        raise AccelerateError(str(error)) from error
    runtime.agreement = agreement_of(next(iter(configs.values())))
    undo.callback(runtime.agreement.close)
    return splits


def _weights(
    given: str | os.PathLike[str] | Mapping[str, torch.Tensor] | None, targets: tuple[Target, ...]
) -> dict[str, torch.Tensor]:
    """Raises AccelerateError for what are no trained tensors of these targets."""
    sites = [f"{each.name}.{path}" for each in targets for path in each.family.site_names(each.transformer)]
    try:
        weights = load_weights(given)
        check_keys(weights, sites)
    except ValueError as error:
        raise AccelerateError(str(error)) from error
    return weights


def _asks_for_hidden_states(plan: Plan | None) -> bool:
    return plan is not None and any(pattern_class(name).HIDDEN_STATES for name in plan.patterns)
