"""`block_sparse.cpp` as a library of this machine, compiled at the first use and kept in the user's cache.

A library's name says what it was made of: the source, the flags, the compiler and the processor. So a newer one is
compiled anew, and a cache that several machines share serves each of them.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from importlib.resources import files
from pathlib import Path

from pointillist.files import write_whole

FLAGS = (
    "-std=c++17", "-O3", "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fPIC", "-shared",
)  # fmt: skip
"""Infinities and NaN keep their meaning, so -ffast-math is out."""
COMPILERS = ("c++", "g++", "clang++")
CHOICE = "POINTILLIST_CPU_KERNEL"
SECONDS_TO_COMPILE = 120
DIGEST_BYTES = hashlib.sha256().digest_size

_lock = threading.Lock()
_kernel: tuple[ctypes.CDLL | None, str] | None = None


def kernel() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernel; or None, and why there is none. The first call may take seconds."""
    global _kernel
    if os.environ.get(CHOICE) == "torch":
        return None, f"asked for by {CHOICE}"
    with _lock:
        if _kernel is None:
            _kernel = _built()
        return _kernel


def _built() -> tuple[ctypes.CDLL | None, str]:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None, "no C++ compiler found; install g++"
    try:
        source = files("pointillist.kernels.cpu").joinpath("block_sparse.cpp").read_bytes()
        path = cache_folder() / f"block_sparse-{_digest_of_origin(source, compiler)}.so"
        if not _is_whole(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            library = _compiled(source, compiler)
            write_whole(path, library + hashlib.sha256(library).digest())
        return ctypes.CDLL(str(path)), ""
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        return None, f"{compiler} does not compile the kernel: {lines[0]:.200}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"the compiled kernel cannot be made or loaded: {error}"


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pointillist" / "kernels"


def _digest_of_origin(source: bytes, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=10).stdout
    origin = [source, *map(str.encode, FLAGS), compiler.encode(), version, _processor()]
    return hashlib.sha256(b"\0".join(origin)).hexdigest()[:24]


def _processor() -> bytes:
    """What -march=native depends on: model and instruction sets."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return f"{platform.machine()} {platform.processor()}".encode()
    kinds = (b"model", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in information.read_bytes().splitlines() if line.startswith(kinds)}))


def _is_whole(path: Path) -> bool:
    """A library ends with the digest of what stands before: loading half a file would end the process."""
    if not path.exists():
        return False
    data = path.read_bytes()
    return hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]


def _compiled(source: bytes, compiler: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="pointillist-") as folder:
        written, library = Path(folder) / "block_sparse.cpp", Path(folder) / "block_sparse.so"
        written.write_bytes(source)
        command = [compiler, *FLAGS, str(written), "-o", str(library)]
        subprocess.run(command, capture_output=True, check=True, timeout=SECONDS_TO_COMPILE)
        return library.read_bytes()
