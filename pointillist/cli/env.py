"""`pointillist env`: this machine, the versions, the backends."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "triton",
    "imageio",
    "imageio-ffmpeg",
    "numpy",
)


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what a report of a problem should contain."""
    facts = describe()
    if as_json:
        print(json.dumps(facts))
        return
    Console().print_json(json.dumps(facts))


def describe() -> dict[str, Any]:
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
