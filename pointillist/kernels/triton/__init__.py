"""The kernels in Triton, one primitive per file. Import nothing here that needs triton: it is optional."""

import contextlib
import importlib.util
import os

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
"""Whether there is a triton to import: looked up once, since every call asks."""


def interpreting() -> bool:
    """Whether Triton's interpreter, which takes CPU tensors, is on (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever the tensors' is: make it theirs."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
