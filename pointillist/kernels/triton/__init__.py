"""The kernels in Triton, one primitive per file. Import nothing here that needs triton: it is optional."""

import os


def interpreting() -> bool:
    """Whether Triton's interpreter, which takes CPU tensors, is on (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
