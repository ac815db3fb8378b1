"""Pointillist makes Diffusers image and video pipelines faster without retraining them.

The names below are imported on first use, so `import pointillist` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointillist.accel.accelerate import accelerate
    from pointillist.accel.conflicts import AccelerateError
    from pointillist.accel.plan import Plan, PlanError
    from pointillist.pipelines.call import defaults
    from pointillist.pipelines.generate import generate
    from pointillist.pipelines.load import load_pipeline
    from pointillist.pipelines.repaint import repaint
    from pointillist.pipelines.search import find_plan

__version__ = "0.1.0"
__all__ = [
    "AccelerateError", "Plan", "PlanError", "accelerate", "defaults", "find_plan", "generate", "load_pipeline",
    "repaint",
]  # fmt: skip

_HOMES = {
    "AccelerateError": "pointillist.accel.conflicts",
    "Plan": "pointillist.accel.plan",
    "PlanError": "pointillist.accel.plan",
    "accelerate": "pointillist.accel.accelerate",
    "defaults": "pointillist.pipelines.call",
    "find_plan": "pointillist.pipelines.search",
    "generate": "pointillist.pipelines.generate",
    "load_pipeline": "pointillist.pipelines.load",
    "repaint": "pointillist.pipelines.repaint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pointillist' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
