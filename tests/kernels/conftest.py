"""Triton's interpreter for this folder: it must be switched on before a kernel module is imported."""

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module", params=["compiled", "torch"])
def cpu_kernel(request):
    """What computes on the backend `cpu`: each of the two for every test that asks for this."""
    from pointillist.kernels.cpu import build

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv(build.CHOICE, "torch")
        elif build.kernel()[0] is None:
            pytest.skip(build.kernel()[1])
        yield request.param


def pytest_collection_modifyitems(items):
    """Other backends are tested once, not with both kernels of `cpu`; where triton has no build, not at all."""

    def repeats(item):
        params = getattr(getattr(item, "callspec", None), "params", {})
        return params.get("cpu_kernel") == "torch" and params.get("backend", "cpu") != "cpu"

    items[:] = [item for item in items if not repeats(item)]
    if importlib.util.find_spec("triton") is None:
        for item in items:
            if "triton" in getattr(getattr(item, "callspec", None), "params", {}).values():
                item.add_marker(pytest.mark.skip(reason="triton has no build for this platform"))


@pytest.fixture(scope="session", autouse=True)
def bfloat16_dot():
    """The interpreter keeps bfloat16 and FP8 as bit patterns and multiplies those; give it a product that widens."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        if handle.dtype.scalar == tl.float8e4nv:
            return torch.from_numpy(handle.data.astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
        return handle.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if {tl.bfloat16, tl.float8e4nv} & {a.dtype.scalar, b.dtype.scalar}:
            product = np.matmul(widened(a), widened(b), dtype=d.data.dtype) + d.data
            return interpreter.TensorHandle(product, d.dtype.scalar)
        return plain(self, a, b, d, input_precision, max_num_imprecise_acc)

    interpreter.InterpreterBuilder.create_dot = create_dot
    yield
    interpreter.InterpreterBuilder.create_dot = plain
