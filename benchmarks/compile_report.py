"""Compiles every Triton kernel for GPUs that are not here, and reports what each would use of them.

    python benchmarks/compile_report.py [--output benchmarks/results/compile.json] [--only sm_90]

Needs no GPU: Triton brings the assemblers. For each architecture and each row of `configs.json` it finds registers,
bytes spilled, shared memory against the architecture's limit, and which matrix instructions the machine code holds;
from these, how many programs fit on a unit at a time. From that and the architecture's rates it estimates the speed of
16-bit attention (`estimate`); no estimate is a measurement. Exit code 1 if a kernel spills, does not fit, or does not
use the architecture's matrix instructions.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", None) == "1":  # read when kernels are imported
    print("TRITON_INTERPRET is ignored: this compiles", file=sys.stderr)

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pointillist.kernels.quantization import GROUP
from pointillist.kernels.triton import block_masses, block_sparse, linear, nearest, permute, pooling, worklist
from pointillist.kernels.triton.configs import Config, fitted, shipped, small_config


@dataclass(frozen=True)
class Architecture:
    """What a unit (SM, CU) of a GPU offers; from the vendors' programming guides."""

    target: GPUTarget
    gpus: str
    shared_per_block: int
    shared_per_unit: int
    registers_per_unit: int
    warps_per_unit: int
    peak_tflops: float
    """Dense bf16 with float32 sums."""
    flops_per_clock: int
    """Of one unit, likewise; exponentials are 16 a clock on all of them."""
    matrix: str
    """Pattern of the matrix instructions in its machine code, 16-bit and INT8."""
    matrix_int8: str


HMMA, IMMA = r"\bHMMA\.", r"\bIMMA\."
ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), "A100", 166912, 167936, 65536, 64, 312, 2048, HMMA, IMMA),
    "sm_89": Architecture(GPUTarget("cuda", 89, 32), "RTX 4090", 101376, 102400, 65536, 48, 165, 512, HMMA, IMMA),
    "sm_90": Architecture(
        GPUTarget("cuda", 90, 32), "H100, H200", 232448, 233472, 65536, 64, 989, 4096, r"\bHGMMA\.", r"\bIGMMA\."
    ),
    "sm_100": Architecture(  # Triton before 3.9 has no tcgen05 for INT8 and takes the older instruction
        GPUTarget("cuda", 100, 32),
        "B200",
        232448,
        233472,
        65536,
        64,
        2250,
        8192,
        r"\bUTCHMMA\b",
        r"\bUTC[IQ]MMA\b|\bIMMA\.",
    ),
    "sm_120": Architecture(GPUTarget("cuda", 120, 32), "RTX 5090", 101376, 102400, 65536, 48, 210, 512, HMMA, IMMA),
    "gfx942": Architecture(
        GPUTarget("hip", "gfx942", 64), "MI300X", 65536, 65536, 131072, 32, 1307, 2048, r"v_mfma_f32", r"v_mfma_i32"
    ),
}
FP8 = ("sm_89", "sm_90", "sm_100", "sm_120")
POINTERS = {16: "*bf16", 32: "*fp32", 8: "*i8"}


@dataclass(frozen=True)
class Case:
    """One kernel compiled one way."""

    architecture: str
    kernel: str
    kind: str
    head_dim: int
    bits: int
    constants: dict[str, Any]
    types: dict[str, str]
    config: Config
    matrix: str | None = field(default=None)
    """Pattern of matrix instructions that the code must hold; None for kernels without a product."""


def attention_cases(name: str) -> list[Case]:
    """Every row of the table in every way that its calls compile, for blocks of 128 and, if tiles change, of 64."""
    cases: dict[tuple, Case] = {}
    for key, row in shipped()[name].items():
        width, bits, kind = key.split("/")
        for label, block, changes in _variants(name, kind, int(width), int(bits)):
            config = fitted(row, block, block)
            case = _attention_case(name, f"{kind} {label} {block}", int(width), int(bits), config, changes)
            cases.setdefault((key, label, config), case)
    return list(cases.values())


def _variants(name: str, kind: str, width: int, bits: int) -> list[tuple[str, int, dict[str, Any]]]:
    """(label, block size, constants that differ from those of blocks of varying size)."""
    means, int8, fp8 = dict(HAS_MEANS=True), dict(SCALE_GROUP=GROUP), dict(SCALE_GROUP=GROUP, FP8_VALUES=True)
    whole, valid, odd = dict(KEY_BLOCK=128), dict(HAS_VALID=True), dict(HEAD_DIM=width * 3 // 4)
    if kind == "uniform":
        return [("even", 128, whole), *(("ragged", n, dict(KEY_BLOCK=n, RAGGED=True)) for n in (128, 64))]
    if kind == "means":
        return [("runs", 128, means), ("runs", 64, means), *([("blocks", 128, means | whole)] if bits == 16 else [])]
    if kind == "int8":
        if bits == 32:
            return [("runs", 128, int8)]
        variants = [("runs", 128, int8), ("runs", 64, int8), ("blocks", 128, int8 | whole)]
        return variants + [("fp8", n, fp8) for n in (128, 64) if name in FP8]
    if kind == "padded":
        variants = [("valid means", 128, valid | means), ("odd blocks", 128, odd | whole | dict(RAGGED=True))]
        if bits == 32:
            return variants
        return [*variants, ("valid", 128, valid), ("odd means", 128, odd | means), ("valid int8", 128, valid | int8)]
    return [("", 128, {}), ("", 64, {})]


def _attention_case(
    name: str, kind: str, width: int, bits: int, config: Config, changes: dict[str, Any]
) -> Case:  # fmt: skip
    architecture, element = ARCHITECTURES[name], POINTERS[bits]
    constants = dict(
        HEAD_DIM=width, BLOCK_D=width, TILE_Q=config.tile_q, TILE_K=config.tile_k, KEY_BLOCK=0, RAGGED=False,
        HAS_VALID=False, HAS_MEANS=False, SCALE_GROUP=0, PRECISION=_precision(name, width), FP8_VALUES=False,
    )  # fmt: skip
    constants |= changes
    int8 = constants["SCALE_GROUP"] > 0
    types = dict.fromkeys(("Q", "K"), "*i8" if int8 else element)
    types |= dict.fromkeys(("V", "OUT", "MEAN_K", "MEAN_V"), element)
    if constants["FP8_VALUES"]:
        types["V"] = "*fp8e4nv"
    types |= dict(VALID="*i1", PAIRS="*i8", scale_log2="fp32")
    types |= dict.fromkeys(("LSE", "QUERY_SCALES", "KEY_SCALES", "VALUE_SCALES", "LOG_COUNTS"), "*fp32")
    types |= dict.fromkeys(("WORK", "LIST"), "*i32")
    matrix = None if bits == 32 else architecture.matrix_int8 if int8 else architecture.matrix
    return Case(name, "block_sparse", kind, width, bits, constants, types, config, matrix)


def other_cases(name: str) -> list[Case]:
    """The smaller kernels, at the tiles that their launchers use."""
    architecture, cases = ARCHITECTURES[name], []
    flags = dict(VALID="*i1", BOUNDS="*i32", QUERY_BOUNDS="*i32", KEY_BOUNDS="*i32", ORDER="*i64", LABELS="*i32")
    floats = dict.fromkeys(("LSE", "STATES", "NORMS"), "*fp32") | dict(scale_log2="fp32")
    for width, bits in ((64, 16), (128, 16), (256, 16), (64, 32), (128, 32), (256, 32)):
        small, element, exact = small_config(width, bits // 8), POINTERS[bits], dict(PRECISION=_precision(name, width))
        tile = small.tile_q
        common = dict(HEAD_DIM=width, BLOCK_D=width)
        features = dict(
            FEATURES=width, BLOCK_F=width, HEAD_DIM=width, BLOCK_V=linear.width_of(width), TILE=linear.TILE
        ) | exact  # fmt: skip
        data = flags | floats | dict.fromkeys(("X", "Q", "K", "V", "CENTROIDS"), element)
        four, eight = Config(64, 64, 4, 2), Config(linear.TILE, linear.TILE, 8, 1)
        for kernel, out, constants, config, dots in (
            ("block_masses", "*fp32", common | exact | dict(TILE_Q=tile, TILE_K=tile, HAS_VALID=True), small, True),
            ("block_means", element, common | dict(TILE=64, HAS_VALID=True), four, False),
            ("move_rows", element, common | dict(TILE=64, BACK=True), four, False),
            ("nearest_centroid", "*i32", common | exact | dict(TILE=tile, TILE_C=tile), small, True),
            ("block_states", "*fp32", features | dict(HAS_VALID=True), eight, True),
            ("apply_states", element, features, eight, False),
        ):
            matrix = architecture.matrix if dots and bits == 16 else None
            cases.append(Case(name, kernel, "", width, bits, constants, data | dict(OUT=out), config, matrix))
    one = dict(HEAD_DIM=1, BLOCK_D=1, TILE=64, BACK=True)  # the log-sum-exp
    cases.append(Case(name, "move_rows", "", 1, 32, one, flags | dict(X="*fp32", OUT="*fp32"), Config(64, 64, 4, 2)))
    tables = dict.fromkeys(("INDPTR", "COLUMNS", "BOUNDS", "BEGINS", "ENDS", "RUNS"), "*i32")
    return [*cases, Case(name, "key_lists", "", 0, 32, dict(TILE=64), tables, Config(64, 64, 4, 1))]


def _precision(architecture: str, head_dim: int) -> str:
    """As `precision_of` has it on that architecture."""
    return "ieee" if architecture.startswith("gfx") or head_dim > 128 else "tf32x3"


KERNELS = {
    "block_sparse": block_sparse.forward,
    "block_masses": block_masses.masses,
    "block_means": pooling.block_means,
    "move_rows": permute.move_rows,
    "nearest_centroid": nearest.nearest_centroid,
    "block_states": linear.block_states,
    "apply_states": linear.apply_states,
    "key_lists": worklist._runs,
}


def examine(case: Case) -> dict[str, Any]:
    """Compile one case and read what it uses: a row of the report."""
    architecture, kernel = ARCHITECTURES[case.architecture], KERNELS[case.kernel]
    names = kernel.arg_names
    types = {n: "constexpr" if n in case.constants else case.types.get(n, "i32") for n in names}
    # at a launch Triton sees by itself that these are multiples of 16
    even = [n for n in names if types[n].startswith("*") or (n.startswith("stride") and n.endswith("s"))]
    even += [n for n in names if n.startswith("stride") and n[-1] in "bh"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(n),): value for n, value in case.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in even},
    )
    compiled = triton.compile(source, target=architecture.target, options=case.config.options())
    read = _read_amd if architecture.target.backend == "hip" else _read_nvidia
    row: dict[str, Any] = dict(
        architecture=case.architecture, kernel=case.kernel, kind=case.kind, head_dim=case.head_dim, bits=case.bits,
        tile_q=case.config.tile_q, tile_k=case.config.tile_k, warps=case.config.warps, stages=case.config.stages,
        max_registers=case.config.max_registers, shared=compiled.metadata.shared,
    )  # fmt: skip
    row |= read(compiled, architecture, case.matrix)
    by_registers = architecture.registers_per_unit // max(
        1, row["registers"] * case.config.warps * architecture.target.warp_size
    )
    by_shared = architecture.shared_per_unit // (row["shared"] + 1024)
    row["programs_per_unit"] = min(by_registers, by_shared, architecture.warps_per_unit // case.config.warps)
    row["faults"] = _faults(row, architecture, case.matrix)
    return row


EXPONENTIALS_PER_CLOCK = 16
ESTIMATED_AT = dict(tokens=32768, density=0.25)
TILE_OVERHEAD = 2.5
"""Loading queries, filling the pipeline and writing out cost as much as so many tiles of 64 keys: an assumption."""


def estimate(row: dict[str, Any]) -> dict[str, Any] | None:
    """TFLOP/s of a 16-bit row, from two limits: products and exponentials one after the other, or side by side.

    One program on a unit runs them one after the other; of two, one may multiply while the other takes exponentials.
    Memory does not limit: K and V of a head lie in the second-level cache.
    """
    if (
        row["kernel"] != "block_sparse"
        or row["bits"] != 16
        or row["head_dim"] > 128
        or row["kind"] != "uniform even 128"
    ):
        return None
    architecture = ARCHITECTURES[row["architecture"]]
    products = 4 * row["head_dim"] / architecture.flops_per_clock  # clocks for one query and one key
    exponentials = 1 / EXPONENTIALS_PER_CLOCK
    tiles = ESTIMATED_AT["tokens"] * ESTIMATED_AT["density"] / 64
    kept_up = tiles / (tiles + TILE_OVERHEAD)
    apart = architecture.peak_tflops * kept_up * products / (products + exponentials)
    together = architecture.peak_tflops * kept_up * products / max(products, exponentials)
    return dict(
        architecture=row["architecture"], gpus=architecture.gpus, head_dim=row["head_dim"],
        programs_per_unit=row["programs_per_unit"], tflops_apart=round(apart), tflops_together=round(together),
    )  # fmt: skip


def _faults(row: dict[str, Any], architecture: Architecture, matrix: str | None) -> list[str]:
    faults = []
    if row["spilled"]:
        faults.append(f"spills {row['spilled']} bytes")
    if row["shared"] > architecture.shared_per_block:
        faults.append(f"needs {row['shared']} bytes of shared memory, {architecture.shared_per_block} exist")
    if row.get("tensor_memory", 0) > 512:
        faults.append(f"needs {row['tensor_memory']} columns of tensor memory, 512 exist")
    if matrix and not row["matrix_instructions"]:
        faults.append(f"holds no {matrix}")
    return faults


def _read_nvidia(compiled: Any, architecture: Architecture, matrix: str | None) -> dict[str, Any]:
    from triton.backends.nvidia.compiler import get_ptxas

    tools, ptx = Path(triton.__file__).parent / "backends/nvidia/bin", compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        binary, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        binary.write_bytes(compiled.asm["cubin"])
        source.write_text(ptx)
        code = _output([tools / "nvdisasm", "-c", binary])
        level = "--regAllocOptLevel=2"
        target = re.search(r"\.target (sm_\w+)", ptx)[1]  # type: ignore[index]
        assembler = get_ptxas(architecture.target.arch).path
        log = _output([assembler, "-v", level, f"--gpu-name={target}", source, "-o", os.devnull])
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if spills is None or registers is None:
        raise RuntimeError(f"{assembler} said nothing of registers: {log[:500]}")
    return dict(
        registers=int(registers[1]),
        spilled=int(spills[1]) + int(spills[2]),
        matrix_instructions=len(re.findall(matrix, code)) if matrix else 0,
        asynchronous_copies=len(re.findall(r"\bLDGSTS|\bUTMALDG", code)),
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
    )


def _read_amd(compiled: Any, architecture: Architecture, matrix: str | None) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    return dict(
        registers=number("vgpr_count"),
        spilled=4 * number("vgpr_spill_count"),
        matrix_instructions=len(re.findall(matrix, code)) if matrix else 0,
        asynchronous_copies=0,
        tensor_memory=0,
    )


def _output(command: list[Any]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[:500]}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compile.json")
    parser.add_argument("--only", choices=ARCHITECTURES, action="append", help="architectures; all if not given")
    args = parser.parse_args()
    cases = [case for name in args.only or ARCHITECTURES for case in attention_cases(name) + other_cases(name)]
    with ProcessPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool:
        rows = list(pool.map(examine, cases, chunksize=4))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    estimates = [made for row in rows if (made := estimate(row)) is not None]
    result = {"triton": triton.__version__, "rows": rows, "estimated_at": ESTIMATED_AT, "estimates": estimates}
    args.output.write_text(json.dumps(result, indent=1) + "\n")

    table = Table(title=f"compiled by Triton {triton.__version__}; nothing here was run on a GPU")
    for heading in ("", "kernel", "D", "bits", "tiles", "warps", "registers", "shared KiB", "programs/unit", "faults"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row["architecture"], f"{row['kernel']} {row['kind']}", str(row["head_dim"]), str(row["bits"]),
            f"{row['tile_q']}×{row['tile_k']}", str(row["warps"]), str(row["registers"]),
            f"{row['shared'] / 1024:.0f}", str(row["programs_per_unit"]), "; ".join(row["faults"]) or "none",
        )  # fmt: skip
    Console(width=140).print(table)
    table = Table(title=f"estimated, not measured: TFLOP/s at {ESTIMATED_AT}")
    for heading in ("", "GPUs", "D", "programs/unit", "one after the other", "side by side"):
        table.add_column(heading)
    for made in estimates:
        table.add_row(*(str(value) for value in made.values()))
    Console(width=140).print(table)
    faulty = sum(bool(row["faults"]) for row in rows)
    print(f"{len(rows)} kernels compiled, {faulty} with faults: {args.output}")
    sys.exit(1 if faulty else 0)


if __name__ == "__main__":
    main()
