"""What a search of a large model costs, from a run on a model of its shape with few layers.

    python benchmarks/search_cost.py                    # Wan-14B's attention, two layers, as many tokens as a CPU bears
    python benchmarks/search_cost.py --device cuda --width 1280 --height 720 --frames 81 --ffn 13824

Measured: one dense clip, and one pass of the profile over all layers, in seconds and in memory beside the model. A pass
takes as many layers as its memory allows; so many passes, and a dense run in each, are what the whole model takes.
Weights are random and the text encoder and VAE are the embedded model's: neither matters to the profile. Results:
benchmarks/results/search_cost_<device>.json.
"""

import argparse
import json
import math
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from pointillist.hardware import detect
from pointillist.pipelines.load import load_pipeline
from pointillist.pipelines.search import study_of
from pointillist.search.profile import Pass, bytes_of_a_layer, passes, record
from pointillist.search.run import run

RESULTS = Path(__file__).parent / "results"
LAYERS = 40
"""Of the model that is estimated."""


def pipeline(layers: int, heads: int, head_dim: int, ffn: int, device: str, dtype: torch.dtype) -> Any:
    """The embedded pipeline around a transformer of another shape, with random weights."""
    pipe = load_pipeline("embedded", dtype=dtype, device=device)
    shape = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim, "ffn_dim": ffn}
    pipe.transformer = WanTransformer3DModel.from_config({**pipe.transformer.config, **shape}).to(device, dtype).eval()
    return pipe


def peak(device: str) -> float:
    """GiB at most so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and GiB of a dense run and of a pass."""
    pipe = pipeline(args.layers, args.heads, args.head_dim, args.ffn, args.device, getattr(torch, args.dtype))
    size = {"width": args.width, "height": args.height, "num_frames": args.frames, "num_inference_steps": args.steps}
    study = study_of(pipe, ("a clip",), **size)

    def told(phase: str) -> Any:
        return lambda step: print(f"{phase} {step}/{study.steps}", flush=True)

    start = time.perf_counter()
    run(pipe, study, study.prompts[0], told("a dense clip"))
    dense, before = time.perf_counter() - start, peak(args.device)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        job = Pass(0, tuple(range(args.layers)))
        playback = record(pipe, study, job, Path(folder) / "profile.safetensors", told)
    seconds, more = time.perf_counter() - start, peak(args.device) - before
    bound = args.layers * bytes_of_a_layer(study) / 2**30
    rounds = len(passes(replace(study, layers=LAYERS)))
    grid = ((args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    return {
        "device": args.device, "machine": detect(), "torch": torch.__version__, "dtype": args.dtype,
        "layers": args.layers, "heads": args.heads, "head_dim": args.head_dim, "ffn": args.ffn,
        "tokens": math.prod(grid), "steps": study.steps, "candidates": len(study.rules),
        "dense_seconds": round(dense, 2), "pass_seconds": round(seconds, 2), "pass_of_dense": round(seconds / dense, 2),
        "forward_seconds": round(playback.seconds, 2), "memory_gib": round(more, 3), "bound_gib": round(bound, 3),
        "passes_of_the_whole_model": rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    for name, value in {
        "layers": 2, "heads": 40, "head-dim": 128, "ffn": 1024, "width": 96, "height": 96, "frames": 25, "steps": 5,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    result = measure(args)
    print(json.dumps(result, indent=1))
    path = RESULTS / f"search_cost_{args.device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
