"""Measure this machine and fit a `HardwareProfile` to it.

The cost model is a sum of counted work × seconds for one of each, so the seconds follow from measured calls by least
squares of relative errors, none of them below 0. How wrong the fit is is told by shapes, densities and patterns that
it has not seen.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from pointillist.accel.plan import Rule
from pointillist.hardware import detect
from pointillist.hardware.profile import NUMBERS, HardwareProfile
from pointillist.kernels.bench import interleaved, matmul_flops
from pointillist.search.cost_model import CostModel, dense_call, site_call
from pointillist.search.site_call import SiteCall, SiteShape, Way
from pointillist.search.work import Work

DENSE = Rule("dense", 1.0)
TAILS = ("none", "pooled")
ROUNDS = 5
SWEEPS = 20_000
MEASURED = "measured by pointillist bench attention --calibrate"
PATTERNS = ("window", "diagonal", "pooled", "sampled", "vertical_slash", "semantic")
"""Static and dynamic, orders shared by all heads and not, rows of equal and of unequal length, sorting, clustering."""
DENSITIES = (0.5, 0.12)
HELD_OUT_PATTERNS = ("neighborhood", "antidiagonal", "stripe", "moba")
HELD_OUT_DENSITIES = (0.3, 0.08)
SHAPES = {
    "cpu": (
        SiteShape((5, 16, 20), 1, 4, 64), SiteShape((8, 20, 24), 1, 4, 64), SiteShape((6, 16, 24), 1, 2, 128),
        SiteShape((6, 16, 24), 1, 4, 32),
    ),
    "cuda": (
        SiteShape((8, 32, 40), 1, 12, 64), SiteShape((12, 40, 64), 1, 8, 64), SiteShape((12, 40, 64), 1, 8, 128),
        SiteShape((16, 45, 80), 1, 8, 128),
    ),
}  # fmt: skip
HELD_OUT_SHAPES = {
    "cpu": (SiteShape((7, 18, 20), 1, 3, 64), SiteShape((9, 20, 28), 1, 4, 64)),
    "cuda": (SiteShape((10, 36, 48), 1, 10, 64), SiteShape((14, 44, 72), 1, 6, 128)),
}


@dataclass(frozen=True)
class Measured:
    """One call of a site: what it did, and the seconds it took."""

    rules: tuple[Rule, ...]
    tail: str
    work: Work
    seconds: float
    """Of the fastest round: what else runs on the machine only adds to it. `median` of the same rounds."""
    median: float


def calibrate(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda message: None,
) -> HardwareProfile:
    """A profile of this machine for one dtype, its `error` on held-out shapes; about a minute on two cores.

    Args:
        progress: told what is measured.

    Raises:
        ValueError: a device whose attention is not modelled.
    """
    device = torch.device(device)
    if device.type not in SHAPES:
        raise ValueError(f"the device is {device}; calibration measures {' and '.join(SHAPES)}")
    known: list[Measured] = []
    held_out: list[Measured] = []
    for shapes, patterns, densities, rows in (
        (SHAPES[device.type], PATTERNS, DENSITIES, known),
        (HELD_OUT_SHAPES[device.type], HELD_OUT_PATTERNS, HELD_OUT_DENSITIES, held_out),
    ):
        for shape in shapes:
            progress(f"{shape.tokens} tokens, {shape.heads} heads of {shape.head_dim}")
            sites = [(Rule(pattern, density),) for density in densities for pattern in patterns]
            rows += measure(sites, shape, dtype, device)
    profile = fitted(known, blank(device, dtype), dtype)
    return replace(profile, error=round(error_of(held_out, profile, dtype), 4))


def measure(
    sites: Sequence[tuple[Rule, ...]], shape: SiteShape, dtype: torch.dtype, device: torch.device
) -> list[Measured]:
    """The dense call, and sites by the rules of their heads (one for all, or one each), with and without a tail.

    Interleaved, so that a busy moment hits all alike. Raises RuntimeError if something cannot run here.
    """
    units, backend = _units(device), _backend(device)
    cases = [(rules, Way(tail, dtype=dtype, backend=backend)) for rules in sites for tail in TAILS]
    with torch.inference_mode():
        calls = [SiteCall(rules * (shape.heads // len(rules)), shape, way, device) for rules, way in cases]
        names = [f"{number}" for number in range(len(cases))]
        work: dict[str, Callable[[], object]] = {"dense": calls[0].dense, **dict(zip(names, calls, strict=True))}
        seconds, failed = interleaved(work, ROUNDS, device)
    if failed:
        raise RuntimeError(f"some calls cannot run here: {failed}")

    def row(name: str, rules: tuple[Rule, ...], tail: str, work: Work) -> Measured:
        return Measured(rules, tail, work, min(seconds[name]), statistics.median(seconds[name]))

    return [row("dense", (DENSE,), "none", dense_call(shape, dtype, backend, units))] + [
        row(name, rules, way.tail, site_call(rules, shape, way, units))
        for name, (rules, way) in zip(names, cases, strict=True)
    ]


def blank(device: torch.device, dtype: torch.dtype) -> HardwareProfile:
    """What is known of this machine before anything but a large matrix product was measured; the rest costs nothing."""
    machine, name = detect(), str(dtype).removeprefix("torch.")
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    memory = machine["memory_gib"] if properties is None else properties.total_memory / 2**30
    return HardwareProfile(
        name=f"{machine['processor']}, {_units(device)} threads" if properties is None else properties.name,
        kind="cpu" if not cuda else "rocm" if torch.version.hip else "cuda",
        units=_units(device),
        matmul_tflops={name: matmul_flops(device, dtype) / 1e12},
        exp_gps=1e9, memory_gbs=1e9, memory_gib=round(memory, 1), launch_us=0.0, row_us=0.0,
        dense_efficiency=1.0, sparse_efficiency=1.0, bias_ps=0.0, gather_ps=0.0, sort_ps=0.0,
        sources=dict.fromkeys(NUMBERS, MEASURED) | dict.fromkeys(("units", "memory_gib"), "what the system says"),
    )  # fmt: skip


def fitted(rows: Sequence[Measured], blank: HardwareProfile, dtype: torch.dtype) -> HardwareProfile:
    """`blank` with the coefficients that predict the seconds best; products beside attention run at its peak."""
    work = np.array([row.work.values() for row in rows])
    seconds = np.array([row.seconds for row in rows])
    names = [each.name for each in fields(Work)]
    flop = 1e-12 / blank.matmul_tflops[str(dtype).removeprefix("torch.")]
    products = names.index("flops")
    rest = seconds - work[:, products] * flop
    work[:, products] = 0
    found = dict(zip(names, non_negative(work / seconds[:, None], rest / seconds), strict=True))
    return replace(
        blank,
        launch_us=found["operators"] * 1e6,
        memory_gbs=_rate(found["bytes"], 1e-9),
        gather_ps=found["gathered"] * 1e12,
        sort_ps=found["sorted"] * 1e12,
        row_us=found["rows"] * 1e6 * blank.units,
        dense_efficiency=_rate(found["dense_flops"], flop),
        sparse_efficiency=_rate(found["sparse_flops"], flop),
        exp_gps=_rate(found["exps"], 1e-9),
        bias_ps=found["biased"] * 1e12,
    )


def error_of(rows: Sequence[Measured], profile: HardwareProfile, dtype: torch.dtype) -> float:
    """Mean absolute relative error of what a profile predicts."""
    model = CostModel(profile, dtype)
    return statistics.mean(abs(model.seconds(row.work) / row.seconds - 1) for row in rows)


def non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x ≥ 0 that minimises |a·x − b|², by coordinate descent; columns of zeros give 0."""
    scale = np.linalg.norm(a, axis=0)
    used = scale > 0
    a = a[:, used] / scale[used]
    gram, target, x = a.T @ a, a.T @ b, np.zeros(int(used.sum()))
    for _ in range(SWEEPS):
        before = x.copy()
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + target[i] - gram[i] @ x)
        if np.abs(x - before).max() <= 1e-10 * np.abs(x).max():
            break
    found = np.zeros(len(scale))
    found[used] = x / scale[used]
    return found


def _rate(seconds: float, unit: float) -> float:
    """What costs so many seconds, as a rate in `unit`; what costs nothing is as fast as a profile may say."""
    return unit / seconds if seconds > unit * 1e-9 else 1e9


def _backend(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "triton"


def _units(device: torch.device) -> int:
    if device.type == "cpu":
        return torch.get_num_threads()
    return torch.cuda.get_device_properties(device).multi_processor_count
