"""Tile sizes, warps and stages of the attention kernel, as data: one row per architecture and kind of call.

`configs.json` ships with the package. Every row says why it is what it is: `compiled` (registers and shared memory as
`benchmarks/compile_report.py` finds them) or `measured`. `pointillist bench attention --tune` measures on the machine
it runs on and writes rows to a file of the user's, which go before these. Nothing is tuned at a first call.
"""

import json
import os
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import triton

from pointillist.files import write_whole

KINDS = ("uniform", "runs", "means", "int8", "padded")
"""Equal blocks; blocks of any size; with block means; INT8 queries and keys; any of these with padding, or with a head
dimension that is no power of 2."""
STAND_INS = (("gfx", 65536, "gfx942"), ("sm_", 166912, "sm_80"), ("sm_", 101376, "sm_89"))
"""Whose rows serve an architecture that has none: (its make, the shared memory that a program may need, the rows)."""


@dataclass(frozen=True)
class Config:
    """How one kind of call is compiled."""

    tile_q: int
    tile_k: int
    warps: int
    stages: int
    max_registers: int | None = None
    """Registers per thread that the compiler may use; None leaves it the choice."""
    why: str = ""

    def options(self) -> dict[str, Any]:
        """Launch options for Triton."""
        options: dict[str, Any] = dict(num_warps=self.warps, num_stages=self.stages)
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


def config_for(
    device: torch.device, head_dim: int, dtype: torch.dtype, kind: str, max_query_block: int, max_key_block: int
) -> Config:
    """The row for this call, with tiles no larger than the blocks."""
    row = _row(architecture_of(device), shared_memory_of(device), _head_dim_class(head_dim), dtype.itemsize * 8, kind)
    return fitted(row, max_query_block, max_key_block)


def fitted(config: Config, max_query_block: int, max_key_block: int) -> Config:
    """`config` with smaller tiles if blocks are smaller; half the queries need half the warps."""
    tile_q = min(config.tile_q, max(16, triton.next_power_of_2(max_query_block)))
    tile_k = min(config.tile_k, max(32, triton.next_power_of_2(max_key_block)))  # 8-bit products need 32
    warps = max(min(4, config.warps), config.warps * tile_q // config.tile_q)
    return Config(tile_q, tile_k, warps, config.stages, config.max_registers, config.why)


def architecture_of(device: torch.device) -> str:
    """`sm_90`, `gfx942` …, or `interpreter` for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def small_config(head_dim: int, itemsize: int) -> Config:
    """Of the smaller kernels with a product: tiles of tokens, keys or centroids that spill on none of the six."""
    tile, warps, stages = {
        (64, 2): (64, 4, 1), (128, 2): (64, 4, 2), (256, 2): (64, 8, 2),
        (64, 4): (32, 8, 1), (128, 4): (16, 4, 1), (256, 4): (16, 4, 1),
    }[_head_dim_class(head_dim), itemsize]  # fmt: skip
    return Config(tile, tile, warps, stages, why="compiled: no spills")


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies float8_e4m3fn; AMD's FP8 of gfx942 is another format."""
    name = architecture_of(device)
    return name == "interpreter" or (name.startswith("sm_") and int(name[3:]) >= 89)


def precision_of(device: torch.device, head_dim: int) -> str:
    """How float32 products are made; 16-bit and INT8 ones do not heed it.

    Up to head dimension 128, NVIDIA's tensor cores make them of three TF32 products, exact enough for FlashAttention's
    rule. Wider heads would spill registers so, and multiply without tensor cores.
    """
    return "ieee" if device.type == "cpu" or torch.version.hip or head_dim > 128 else "tf32x3"


def shared_memory_of(device: torch.device) -> int:
    """Bytes that one program may use; 0 on the CPU."""
    if device.type == "cpu":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 65536)


def user_file() -> Path:
    """Where `bench attention --tune` writes: $POINTILLIST_CONFIGS, or kernels.json in the user's configuration."""
    base = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    return Path(os.environ.get("POINTILLIST_CONFIGS", base / "pointillist" / "kernels.json"))


def shipped() -> dict[str, dict[str, Config]]:
    """Architecture → "head dimension/bits/kind" → configuration, of the table that ships."""
    return _parsed(files("pointillist.kernels.triton").joinpath("configs.json").read_text(encoding="utf-8"))


def save_tuned(architecture: str, rows: dict[str, Config]) -> Path:
    """Add measured rows to the user's file."""
    path = user_file()
    known = _parsed(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[architecture] = {**known.get(architecture, {}), **rows}
    text = {arch: {key: asdict(row) for key, row in each.items()} for arch, each in known.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(text, indent=1) + "\n").encode())
    _tables.cache_clear()
    _row.cache_clear()
    return path


def _parsed(text: str) -> dict[str, dict[str, Config]]:
    return {arch: {key: Config(**row) for key, row in rows.items()} for arch, rows in json.loads(text).items()}


def _head_dim_class(head_dim: int) -> int:
    """64, 128 or 256: the width that a head dimension is computed at, as far as resources go."""
    return next(width for width in (64, 128, 256) if head_dim <= width)


@lru_cache
def _tables() -> tuple[dict[str, dict[str, Config]], dict[str, dict[str, Config]]]:
    path = user_file()
    try:
        tuned = _parsed(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of kernel configurations ({error}); mend or delete it") from error
    return tuned, shipped()


@lru_cache
def _row(architecture: str, shared_memory: int, head_dim: int, bits: int, kind: str) -> Config:
    tuned, table = _tables()
    key = f"{head_dim}/{bits}/{kind}"
    if key in tuned.get(architecture, {}):
        return tuned[architecture][key]
    if architecture not in table:
        rows = [name for make, needs, name in STAND_INS if architecture.startswith(make) and shared_memory >= needs]
        if not rows:
            raise ValueError(
                f"the Triton kernels serve no {architecture} with {shared_memory} bytes of shared memory; "
                'use backend="reference"'
            )
        instead = rows[0]
        warnings.warn(
            f"no tested kernel configuration for {architecture}: using those of {instead}; "
            "`pointillist bench attention --tune` measures better ones",
            stacklevel=2,
        )
        architecture = instead
    return table[architecture][key]
