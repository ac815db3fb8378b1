"""Everything that is checked before anything is changed."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from pointillist.accel import bridge
from pointillist.accel.dense import check_dense
from pointillist.accel.models import SUPPORTED, family_of, other
from pointillist.kernels import choose_backend


class AccelerateError(ValueError):
    """A pipeline or an argument that cannot be accelerated: what was given, what is allowed, what to do."""


@dataclass(frozen=True)
class Target:
    """A transformer to accelerate: its component name, and its family's module in `models`."""

    name: str
    transformer: Any
    family: ModuleType


def targets_of(pipe: Any, sparse: bool = True) -> tuple[Target, ...]:
    """The transformers of `pipe`, all of them free of conflicts; with `sparse` they have an adapter for attention.

    Raises:
        AccelerateError: one is of an unsupported class, already accelerated, cached, compiled or parallel.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise AccelerateError(f"{type(pipe).__name__} is not a Diffusers pipeline: it has no components")
    found = {name: components.get(name) for name in ("transformer", "transformer_2")}
    targets = tuple(_target(name, module, sparse) for name, module in found.items() if module is not None)
    if not targets:
        raise AccelerateError(f"{type(pipe).__name__} has no transformer; supported are pipelines with a {SUPPORTED}")
    for method in ("set_timesteps", "step"):
        if not hasattr(components.get("scheduler"), method):
            raise AccelerateError(f"the scheduler of {type(pipe).__name__} has no {method}; the steps are read from it")
    return targets


def check_arguments(pipe: Any, backend: str, dense: str) -> None:
    """Raises AccelerateError for values that this version cannot carry out."""
    try:
        device = torch.device(getattr(pipe, "_execution_device", pipe.device))  # they differ when offloading
        choose_backend(device, backend)
        check_dense(dense, device)
    except ValueError as error:
        raise AccelerateError(str(error)) from error


def _target(name: str, transformer: torch.nn.Module, sparse: bool) -> Target:
    described = f"pipe.{name} ({type(transformer).__name__})"
    if bridge.is_compiled(transformer):
        raise AccelerateError(f"{described} is compiled; call accelerate first and torch.compile after it")
    family = family_of(transformer)
    if family is None:
        raise AccelerateError(f"{described} is not supported; supported is {SUPPORTED}")
    if family is other and sparse:
        raise AccelerateError(
            f"{described} is not supported by sparse attention, {SUPPORTED} is; "
            "accelerate(pipe, plan='none', cache='easy') reuses steps of any model"
        )
    if bridge.foreign_cache(transformer):
        raise AccelerateError(f"{described} is cached by {bridge.foreign_cache(transformer)}; remove that first")
    sites = family.sites(transformer)
    if any(bridge.is_routed(attention) for _, attention in sites):
        raise AccelerateError(f"{described} is already accelerated; call restore() on the first handle")
    if any(bridge.is_compiled(block) for block, _ in sites):
        raise AccelerateError(f"{described} has compiled blocks; call accelerate first and compile after it")
    if caches := bridge.caching_hooks(transformer):
        raise AccelerateError(f"{described} has a Diffusers cache ({', '.join(caches)}); call disable_cache() on it")
    if any(bridge.is_parallel(attention) for _, attention in sites):
        raise AccelerateError(f"{described} is split over processes (enable_parallelism), which is not supported")
    for layer, (_, attention) in enumerate(sites):
        if not bridge.uses_dispatcher(attention):
            raise AccelerateError(
                f"{described} has a {type(attention.processor).__name__} at {family.site_name(layer)}, "
                "which does not call Diffusers' attention dispatcher; set the model's own processor"
            )
    return Target(name, transformer, family)
