"""Compiling the CPU kernel: once, whole, and with a reason where it cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pointillist.kernels import BlockLayout, block_sparse_attention, choose_backend
from pointillist.kernels.cpu import build

COMPILED = "compiled for this machine"


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and a process that has not looked for a kernel yet; gives the folder of kernels."""
    if build.kernel()[0] is None:
        pytest.skip(build.kernel()[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(build.CHOICE, raising=False)
    monkeypatch.setattr(build, "_kernel", None)
    return tmp_path / "pointillist" / "kernels"


def forget(monkeypatch):
    """As a new process begins."""
    monkeypatch.setattr(build, "_kernel", None)


def assert_right():
    q, k, v = (torch.randn(1, 2, 50, 16) for _ in range(3))
    layout = BlockLayout.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 32, 32, 50, 50)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout, backend="cpu"), dense)


def test_it_is_compiled_once(fresh, monkeypatch):
    assert choose_backend("cpu") == ("cpu", f"the tensors are on the CPU; {COMPILED}")
    assert_right()
    (library,) = fresh.iterdir()
    forget(monkeypatch)
    monkeypatch.setattr(build, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert choose_backend("cpu", "cpu") == ("cpu", f"asked for; {COMPILED}")
    assert list(fresh.iterdir()) == [library]


def test_without_a_compiler_the_fallback_names_itself(fresh, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert choose_backend("cpu")[1].endswith("torch operators: no C++ compiler found; install g++")
    assert_right()


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "error: no such flag" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "COMPILERS", (str(compiler),))
    assert choose_backend("cpu")[1].endswith("broken does not compile the kernel: error: no such flag")
    assert_right()


def test_a_cache_that_cannot_be_written_is_told(fresh, monkeypatch, tmp_path):
    (tmp_path / "pointillist").write_text("a file in the place of the folder")
    assert "torch operators: the compiled kernel cannot be made or loaded" in choose_backend("cpu")[1]
    assert_right()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" + data])
def test_a_broken_file_is_built_anew(fresh, monkeypatch, damage):
    build.kernel()
    (library,) = fresh.iterdir()
    whole = library.read_bytes()
    library.unlink()  # the loaded one stays as it is
    library.write_bytes(damage(whole))
    forget(monkeypatch)
    assert choose_backend("cpu")[1].endswith(COMPILED)
    assert len(library.read_bytes()) == len(whole)
    assert_right()


def test_two_processes_may_compile_at_once(fresh):
    code = "from pointillist.kernels import choose_backend; print(choose_backend('cpu')[1])"
    command = [sys.executable, "-c", code]
    root = Path(build.__file__).parents[3]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ) for _ in range(2)]
    assert all(COMPILED in process.communicate(timeout=120)[0] for process in both)
    (library,) = fresh.iterdir()
    assert build._is_whole(library)


def test_the_operators_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(build.CHOICE, "torch")
    assert choose_backend("cpu")[1].endswith("torch operators: asked for by POINTILLIST_CPU_KERNEL")
