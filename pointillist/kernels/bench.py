"""How fast attention is on this machine: ours against every dense implementation that runs here.

All variants of a shape run in turn within each round, so that a busy moment hits every one of them; medians count.
Kept blocks are drawn at random, as many in every row; they lie scattered, as those of a video do.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pointillist.kernels.dispatch import attention_with_pooled_tail, block_sparse_attention
from pointillist.kernels.layout import BlockLayout, uniform_bounds
from pointillist.kernels.pooling import pool_blocks
from pointillist.kernels.selection import top_k
from pointillist.kernels.triton import INSTALLED

Work = Callable[[], object]
BLOCK = 128
MATH_BYTES = 2**31
"""The plain implementation writes all scores; above this many bytes of them it is left out."""


@dataclass(frozen=True)
class Row:
    """One variant at one shape."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    variant: str
    density: float
    """Kept share of the token pairs; blocks make it differ from what was asked for."""
    milliseconds: float
    """Median; the fastest and the slowest round beside it."""
    fastest_ms: float
    slowest_ms: float
    speedup: float
    """Over the fastest dense implementation of the same shape, medians."""
    share_of_ideal: float | None
    """Speed-up × density: 1 if sparse pairs are as fast as those of the fastest dense implementation."""
    share_of_own: float | None
    """The same against ours at density 1; of ours only."""
    tflops: float | None
    """Of the kept pairs, 4·S²·D·density for each head; None for what is no attention."""
    share_of_matmul_limit: float | None
    """Of what a large matrix product reaches on this machine in this dtype."""


def attention_rows(
    device: torch.device, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, *,
    densities: tuple[float, ...], rounds: int, flex: bool, limit: float,
) -> tuple[list[Row], dict[str, str]]:  # fmt: skip
    """All variants at one shape, and what could not run: name → reason. `limit` is that of `matmul_flops`."""
    q, k, v = (torch.randn(1, heads, tokens, head_dim, device=device, dtype=dtype) for _ in range(3))
    work, absent = dense_implementations(q, k, v)
    dense, realised = tuple(work), {}
    for density in densities:
        layout = random_layout(heads, tokens, density, device)
        realised[f"{density:g}"] = layout.density()
        work[f"pointillist {density:g}"] = partial(block_sparse_attention, q, k, v, layout)
        if density < 1:
            work[f"with tail {density:g}"] = partial(attention_with_pooled_tail, q, k, v, layout)
        work[f"selection {density:g}"] = partial(select, q, k, density)
        work[f"selection and attention {density:g}"] = partial(_selected, q, k, v, density)
        if device.type == "cuda" and density < 1 and dtype != torch.float32:
            for kind in ("int8", "int8_fp8"):
                work[f"{kind} {density:g}"] = partial(block_sparse_attention, q, k, v, layout, quantized=kind)
        if flex:
            work[f"flex {density:g}"] = flex_attention_of(q, k, v, layout)
    seconds, failed = interleaved(work, rounds, device)
    absent |= failed
    fastest = min(statistics.median(seconds[name]) for name in dense if name in seconds)
    own = statistics.median(seconds["pointillist 1"]) if "pointillist 1" in seconds else None
    rows = []
    for name, times in seconds.items():
        variant, _, asked = name.rpartition(" ") if name not in dense else (name, "", "")
        density, median = realised.get(asked, 1.0), statistics.median(times)
        flops = 4 * heads * tokens**2 * head_dim * density / median
        attends, ours = variant != "selection", variant == "pointillist" and own is not None
        rows.append(
            Row(
                tokens, heads, head_dim, str(dtype).removeprefix("torch."), variant, round(density, 4),
                round(median * 1e3, 3), round(min(times) * 1e3, 3), round(max(times) * 1e3, 3),
                round(fastest / median, 3), round(fastest / median * density, 3) if attends else None,
                round((own or 0.0) * density / median, 3) if ours else None,
                round(flops / 1e12, 4) if attends else None, round(flops / limit, 3) if attends else None,
            )
        )  # fmt: skip
    return rows, absent


def dense_implementations(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[dict[str, Work], dict[str, str]]:
    """Every dense attention that this machine may have, as calls, and those that it surely lacks with the reason."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    absent: dict[str, str] = {}

    def on(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    work: dict[str, Work] = {"dense sdpa": partial(sdpa, q, k, v)}
    if q.is_cuda:
        work["dense cudnn"] = partial(on, SDPBackend.CUDNN_ATTENTION)
        work["dense flash"] = partial(on, SDPBackend.FLASH_ATTENTION)
        work["dense efficient"] = partial(on, SDPBackend.EFFICIENT_ATTENTION)
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * 4 <= MATH_BYTES:
        work["dense math"] = partial(on, SDPBackend.MATH)
    try:
        from xformers.ops import memory_efficient_attention

        swapped = tuple(x.transpose(1, 2) for x in (q, k, v))
        work["dense xformers"] = partial(memory_efficient_attention, *swapped)
    except ImportError:
        absent["dense xformers"] = "not installed (pip install pointillist[xformers])"
    return work, absent


def random_layout(heads: int, tokens: int, density: float, device: torch.device) -> BlockLayout:
    """Blocks of 128; every row keeps the same number of random ones."""
    blocks = -(-tokens // BLOCK)
    keep = max(1, round(density * blocks))
    mask = top_k(torch.rand(1, heads, blocks, blocks, device=device), keep)
    return BlockLayout.from_mask(mask, BLOCK, BLOCK, tokens, tokens, pairs=heads * blocks * keep)


def select(q: torch.Tensor, k: torch.Tensor, density: float) -> BlockLayout:
    """Choosing blocks by pooled scores and laying them out: what a dynamic pattern does before attention."""
    heads, tokens, bounds = q.shape[1], q.shape[2], uniform_bounds(q.shape[2], BLOCK, q.device)
    (q_means, _), (k_means, _) = pool_blocks(q, bounds), pool_blocks(k, bounds)
    scores = q_means @ k_means.transpose(-1, -2)
    keep = max(1, round(density * scores.shape[-1]))
    return BlockLayout.from_mask(
        top_k(scores, keep), BLOCK, BLOCK, tokens, tokens, pairs=heads * scores.shape[-1] * keep
    )


def _selected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, density: float) -> object:
    """All that a call of a dynamic pattern costs, its layout never seen before."""
    return block_sparse_attention(q, k, v, select(q, k, density))


def flex_attention_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> Work:
    """FlexAttention over the same block pairs, compiled at its first call."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    mask = layout.mask()
    counts = mask.sum(-1, dtype=torch.int32)
    columns = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    none, tokens = torch.zeros_like(counts), q.shape[2]
    blocks = BlockMask.from_kv_blocks(
        none, torch.zeros_like(columns), counts, columns, BLOCK_SIZE=(BLOCK, BLOCK), seq_lengths=(tokens, tokens)
    )
    return partial(_compiled(flex_attention), q, k, v, block_mask=blocks)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What this machine reaches in a large matrix product, FLOP/s: the practical limit of any attention."""
    size = 8192 if device.type == "cuda" else 512 if dtype == torch.float16 else 2048  # float16 crawls on CPUs
    a = torch.randn(size, size, device=device, dtype=dtype)
    times, _ = interleaved({"matmul": lambda: a @ a}, 5, device)
    return 2 * size**3 / min(times["matmul"])


def interleaved(
    work: Mapping[str, Work], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call in every round, after one that warms up; and the calls that fail, with their reason."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    failed: dict[str, str] = {}
    for round_ in range(rounds + 1):
        for name, each in work.items():
            if name in failed:
                continue
            try:
                elapsed = _seconds_of(each, device)
            except _cannot_run() as error:
                lines = str(error).strip().splitlines() or [""]
                failed[name] = f"{type(error).__name__}: {lines[0][:200]}"
                continue
            if round_:
                seconds[name].append(elapsed)
    return {name: times for name, times in seconds.items() if name not in failed}, failed


def _cannot_run() -> tuple[type[Exception], ...]:
    """What implementations raise that do not run here, Triton's own errors among them."""
    if not INSTALLED:
        return RuntimeError, ValueError
    from triton.errors import TritonError

    return RuntimeError, ValueError, TritonError


def _seconds_of(work: Work, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


TUNED_TILES = ((128, 128, 8), (128, 64, 8), (128, 64, 4), (128, 32, 8), (64, 64, 4))
"""Queries, keys and warps that `tuned_rows` tries."""


def tuned_rows(
    device: torch.device, head_dims: tuple[int, ...], tokens: int, rounds: int = 5
) -> Iterator[tuple[str, Any]]:
    """The fastest configuration of each kind of call on this GPU: ("head dimension/bits/kind", `Config`) as found."""
    from pointillist.kernels.pooling import means_of
    from pointillist.kernels.quantization import quantize
    from pointillist.kernels.triton.block_sparse import launch
    from pointillist.kernels.triton.configs import Config, shared_memory_of

    limit = shared_memory_of(device)
    caps = (None,) if torch.version.hip else (None, 128)
    for head_dim in head_dims:
        q, k, v = (torch.randn(1, 16, tokens, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3))
        candidates = [
            Config(tile_q, tile_k, warps, stages, registers)
            for tile_q, tile_k, warps in TUNED_TILES
            for stages in (2, 3)
            for registers in caps
            if 2 * head_dim * (tile_q + 2 * stages * tile_k) <= limit
        ]
        layout = random_layout(16, tokens, 0.25, device)
        runs = BlockLayout.from_bounds(
            layout.mask(), layout.query_bounds, layout.key_bounds, tokens, tokens,
            max_query_block=BLOCK, max_key_block=BLOCK, pairs=layout.columns.numel(),
        )  # fmt: skip
        means, quantized, scale = means_of(k, v, layout), quantize(q, k, layout), head_dim**-0.5
        extras = dict(uniform=(layout, None, None), runs=(runs, None, None), means=(runs, means, None))
        for kind, (used, tail, rounded) in {**extras, "int8": (runs, None, quantized)}.items():
            work = {
                str(number): partial(launch, q, k, v, used, scale, config, tail, None, rounded)
                for number, config in enumerate(candidates)
            }
            seconds, _ = interleaved(work, rounds, device)
            if not seconds:
                continue
            best = min(seconds, key=lambda name: statistics.median(seconds[name]))
            median = statistics.median(seconds[best]) * 1e3
            found = {**asdict(candidates[int(best)]), "why": f"measured: {median:.2f} ms at {tokens} tokens, 16 heads"}
            yield f"{head_dim}/16/{kind}", Config(**found)
