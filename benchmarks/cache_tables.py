"""Learned cache tables against tables of fixed intervals that reuse as many modules, on the embedded model.

    python benchmarks/cache_tables.py [--table FILE.json] [--beside NAME=FILE.json …] [--prompts 4 --size 176]

Every clip is compared with the dense one of the same prompt and seed. Clips of a `--folder` are not made again. What is
measured is added to the results after every clip.
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
PROMPTS = (
    "a red circle moving left on black", "a green square moving right on gray", "a blue triangle moving up on white",
    "a yellow star moving down on black", "a white circle growing on blue", "a red square rotating on gray",
    "a green circle moving left on white", "a blue square moving up on black",
)  # fmt: skip
SEEDS = 50
"""Of the first prompt."""


def tables(learned: CacheTable, beside: list[str]) -> dict[str, CacheTable | str]:
    """What is compared: tables reuse equal shares of the modules if the learned one reuses half."""
    others = dict(each.split("=", 1) for each in beside)
    return {
        "dense": "none",
        "learned": learned,
        **{name: CacheTable.load(path) for name, path in others.items()},
        "every second step (FORA)": CacheTable.every(learned.steps, learned.layers, 2),
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
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=FILE", help="another table")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--size", type=int, help="pixels; by default the model's own size")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "cache_tables_cpu.json")
    args = parser.parse_args()
    pipe = load_pipeline("embedded")
    call = defaults(pipe)
    size = args.size or call["width"]
    call |= {"width": size, "height": size, "num_frames": args.frames or call["num_frames"]}
    learned = CacheTable.load(args.table)
    result = json.loads(args.output.read_text()) if args.output.exists() else {"clips": []}
    result |= {
        "machine": detect(), "torch": torch.__version__, "threads": torch.get_num_threads(), "learned": learned.name,
    }  # fmt: skip
    for seed, prompt in enumerate(PROMPTS[: args.prompts], SEEDS):
        dense: dict[str, Any] = {}
        for name, table in tables(learned, args.beside).items():
            started = time.perf_counter()
            what = {"prompt": prompt, "seed": seed, "size": size, "frames": call["num_frames"], "table": name}
            kept = args.folder and args.folder / f"{seed}-{size}-{call['num_frames']}-{name}.npz"
            made = clip(pipe, table, {**call, "prompt": prompt}, seed, kept)
            dense = dense or made
            if name == "dense":
                continue
            psnr = round(compare(dense["frames"], made["frames"]).psnr, 2)
            others = [each for each in result["clips"] if any(each[key] != value for key, value in what.items())]
            result["clips"] = [*others, {**what, "psnr": psnr}]
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{prompt}, {name}: {psnr} dB ({time.perf_counter() - started:.0f} s)", flush=True)
    print(args.output)


if __name__ == "__main__":
    main()
