"""Sparse against dense attention on this machine, at the shapes of the embedded model.

    python benchmarks/attention.py [--tokens 4356 --rounds 7]

All variants run in turn within each round, so that a busy moment hits every one of them; medians count. Blocks
are drawn at random and lie scattered in the sequence, as the tiles of a video do.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pointillist.hardware import detect
from pointillist.kernels import BlockLayout, attention_with_pooled_tail, block_sparse_attention, choose_backend

BLOCK = 128
DENSITIES = (1.0, 0.5, 0.25, 0.17, 0.1)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What this machine reaches in a large matrix product, FLOP/s: the practical limit of any attention."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds_of(lambda: a @ a, device) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4356)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, args.heads, args.tokens, args.head_dim, device=device, dtype=dtype) for _ in range(3))
    order = torch.randperm(args.tokens, device=device)[None, None]
    blocks = -(-args.tokens // BLOCK)

    work: dict[tuple[str, float], Callable[[], object]] = {
        ("dense", 1.0): lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    }
    for density in DENSITIES:
        kept = torch.rand(1, args.heads, blocks, blocks, device=device).topk(round(density * blocks), -1).indices
        mask = torch.zeros(1, args.heads, blocks, blocks, dtype=torch.bool, device=device).scatter_(-1, kept, True)
        layout = BlockLayout.from_mask(mask, BLOCK, BLOCK, args.tokens, args.tokens, query_order=order, key_order=order)
        work["sparse", density] = lambda layout=layout: block_sparse_attention(q, k, v, layout)
        if density < 1:
            work["with tail", density] = lambda layout=layout: attention_with_pooled_tail(q, k, v, layout)

    times: defaultdict[tuple[str, float], list[float]] = defaultdict(list)
    for round_ in range(args.rounds + 1):
        for name, each in work.items():
            seconds = seconds_of(each, device)
            if round_:  # the first round warms up
                times[name].append(seconds)

    limit = matmul_flops(device, dtype)
    dense = statistics.median(times["dense", 1.0])
    rows = []
    for (variant, density), seconds in times.items():
        median = statistics.median(seconds)
        flops = 4 * args.heads * args.tokens**2 * args.head_dim * density
        rows.append(
            {
                "variant": variant,
                "density": density,
                "milliseconds": round(median * 1e3, 2),
                "fastest_ms": round(min(seconds) * 1e3, 2),
                "slowest_ms": round(max(seconds) * 1e3, 2),
                "speedup": round(dense / median, 3),
                "share_of_matmul_limit": round(flops / median / limit, 3),
            }
        )
    backend, reason = choose_backend(device)
    result = {
        "machine": detect(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend,
        "backend_reason": reason,
        "shape": {"tokens": args.tokens, "heads": args.heads, "head_dim": args.head_dim, "block": BLOCK},
        "rounds": args.rounds,
        "matmul_gflops": round(limit / 1e9, 1),
        "rows": rows,
    }
    output = args.output or Path(__file__).parent / "results" / f"attention_{device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")

    table = Table(title=f"{args.tokens} tokens, {args.heads} heads × {args.head_dim}, {result['dtype']}, {backend}")
    for heading in ("", "density", "ms", "speed-up", "of the matmul limit"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["variant"], f"{row['density']:g}", f"{row['milliseconds']:.1f}", f"{row['speedup']:.2f}×",
            f"{row['share_of_matmul_limit']:.0%}",
        )  # fmt: skip
    Console().print(table)
    print(output)


if __name__ == "__main__":
    main()
