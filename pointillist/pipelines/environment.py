"""This machine, the versions, the backends: what a report of a problem should contain."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "triton",
    "imageio",
    "imageio-ffmpeg",
    "numpy",
    "gradio",
)


def describe() -> dict[str, Any]:
    """As an object of JSON."""
    import torch

    import pointillist
    from pointillist.hardware import detect
    from pointillist.kernels import available_backends, choose_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen, reason = choose_backend(device)
    return {
        "pointillist": pointillist.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": detect(),
        "backend": {
            "chosen": chosen,
            "reason": reason,
            "unavailable": {k: v for k, v in available_backends(device).items() if v},
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
