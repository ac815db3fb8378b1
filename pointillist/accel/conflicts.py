"""Everything that can speak against accelerating a pipeline, checked before anything is changed."""

from typing import Any


class AccelerateError(ValueError):
    """The pipeline cannot be accelerated as asked; nothing was changed."""


MARK = "_pointillist"
"""Name of the attribute that an accelerated transformer carries."""

SUPPORTED = ("WanTransformer3DModel",)


def transformers_of(pipe: Any) -> dict[str, Any]:
    """The denoising transformers of `pipe`, by component name (Wan 2.2 has two)."""
    found = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: module for name, module in found.items() if module is not None}


def check(pipe: Any, cache: str | None, regions: str | None) -> None:
    """Raise `AccelerateError` with what stands in the way, or return."""
    for name, value in (("cache", cache), ("regions", regions)):
        if value not in ("auto", "none", None):
            raise AccelerateError(
                f'{name}={value!r} is not available; allowed are "auto" (what the plan says) and "none"'
            )
    found = transformers_of(pipe)
    if not found:
        raise AccelerateError(f"{type(pipe).__name__} has no transformer to accelerate; give a diffusion pipeline with one")
    for name, transformer in found.items():
        kind = type(transformer).__name__
        if kind not in SUPPORTED:
            raise AccelerateError(f"{name} is a {kind}, which has no adapter; supported are {', '.join(SUPPORTED)}")
        if hasattr(transformer, MARK):
            raise AccelerateError(f"{name} is accelerated already; call restore() on the earlier handle first")
        if getattr(transformer, "is_cache_enabled", False):
            raise AccelerateError(
                f"{name} has a Diffusers cache enabled, which would skip what is planned; "
                f"call pipe.{name}.disable_cache() first"
            )
        if getattr(transformer, "_parallel_config", None) is not None:
            raise AccelerateError(f"{name} is split over several devices; only whole transformers on one device are supported")
