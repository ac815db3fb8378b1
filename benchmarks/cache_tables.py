"""Learned cache tables against tables of fixed intervals that reuse as many modules, on the embedded model.

    python benchmarks/cache_tables.py [--table FILE.json] [--prompts 2 --size 176] [--folder DIR]

Every clip is compared with the dense one of the same prompt and seed. Clips are kept in the folder, if one is given,
and are not made again. Writes the result after every clip.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointillist import defaults, load_pipeline
from pointillist.accel.step_cache.table import FOLDER, CacheTable
from pointillist.hardware import detect
from pointillist.metrics import compare
from pointillist.pipelines.run import run_once

RESULTS = Path(__file__).parent / "results"
PROMPTS = ("a red circle moving left on black", "a green square moving right on gray")


def tables(learned: CacheTable) -> dict[str, CacheTable | str]:
    """What is compared: tables reuse equal shares of the modules if the learned one reuses half."""
    steps, layers = learned.steps, learned.layers
    return {
        "dense": "none",
        "learned": learned,
        "every second step (FORA)": CacheTable.every(steps, layers, 2),
    }


def clip(pipe: Any, cache: CacheTable | str, call: dict[str, Any], seed: int, kept: Path | None) -> dict[str, Any]:
    """Frames, and what the report says of the cache."""
    if kept is not None and kept.exists():
        with np.load(kept, allow_pickle=False) as file:
            return {"frames": file["frames"], "cache": str(file["cache"])}
    run = run_once(pipe, "none", call, seed, lambda event: None, "", cache=cache)  # type: ignore[arg-type]
    made = {"frames": run.frames, "cache": run.report.cache}
    if kept is not None:
        np.savez(kept, **made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=FOLDER / "embedded.json")
    parser.add_argument("--only", help="one of what is compared, beside dense")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--size", type=int, help="pixels; by default the model's own size")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    pipe = load_pipeline("embedded")
    call = defaults(pipe)
    if args.size:
        call |= {"width": args.size, "height": args.size}
    learned = CacheTable.load(args.table)
    output = args.output or RESULTS / "cache_tables_cpu.json"
    chosen = {name: each for name, each in tables(learned).items() if args.only in (None, name) or name == "dense"}
    clips: list[dict[str, Any]] = []
    for seed, prompt in enumerate(PROMPTS[: args.prompts]):
        dense: dict[str, Any] = {}
        for name, table in chosen.items():
            started = time.perf_counter()
            kept = args.folder and args.folder / f"{seed}-{call['width']}-{name}.npz"
            made = clip(pipe, table, {**call, "prompt": prompt}, seed, kept)
            dense = dense or made
            difference = compare(dense["frames"], made["frames"])
            clips.append({
                "prompt": prompt, "seed": seed, "table": name, "cache": made["cache"],
                "modules reused": table.share if isinstance(table, CacheTable) else 0.0,
                "psnr": round(difference.psnr, 3), "ssim": round(difference.ssim, 4),
            })  # fmt: skip
            result = {
                "machine": detect(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                "call": call, "learned": learned.name, "clips": clips,
            }  # fmt: skip
            output.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{prompt}, {name}: {difference.psnr:.2f} dB ({time.perf_counter() - started:.0f} s)", flush=True)
    print(output)


if __name__ == "__main__":
    main()
