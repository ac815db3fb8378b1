"""What regions and step caches keep: predicted, counted, and what the process holds more, in bytes.

    python benchmarks/memory.py [--model wan-14b-layer|embedded] [--frames 13 --size 512 --output FILE]

`wan-14b-layer` is one layer of Wan 2.1 14B's size (40 heads of 128 channels) with random weights in bfloat16;
`embedded` is the model that ships, on its full grid. Every feature runs the same two steps as a run without any did
before, in the same process, whose resident memory is looked at behind them, when what was freed has been given back.
"""

import argparse
import ctypes
import gc
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1048576")  # read when the process starts: see `main`
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "1048576")

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from pointillist import accelerate, defaults, load_pipeline
from pointillist.accel.step_cache.policy import Caching
from pointillist.accel.step_cache.table import CacheTable
from pointillist.hardware import detect

RESULTS = Path(__file__).parent / "results"
REGIONS = "change:share=0.3,every=9,from=1,predictor=last"
"""Two steps leave keys of one."""
CURVE = Caching("magnitude", (("curve", (1.0, 1.0)), ("threshold", 9.0)), predictor="taylor", first=1.0)
FEATURES: dict[str, dict[str, Any]] = {
    "regions": {"regions": REGIONS},
    "regions, keys=fp8": {"regions": f"{REGIONS},keys=fp8"},
    "regions, keys=input": {"regions": f"{REGIONS},keys=input"},
    "cache, last two residuals": {"cache": CURVE},
    "cache, rate": {"cache": "rate:threshold=0"},
    "cache table": {"cache": "table"},
}


def wan_layer() -> WanPipeline:
    """A pipeline of one layer of Wan 2.1 14B."""
    torch.set_default_dtype(torch.bfloat16)
    transformer = WanTransformer3DModel(num_layers=1, num_attention_heads=40, attention_head_dim=128).eval()
    torch.set_default_dtype(torch.float32)
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    return WanPipeline(
        transformer=transformer.to(torch.bfloat16), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(pipe: Any, call: dict[str, Any], **features: Any) -> dict[str, int]:
    """Two steps: the first keeps what the second would use, or continue a line from."""
    seen: list[int] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(resident())
        if len(seen) == 2:
            pipe._interrupt = True
        return tensors

    with accelerate(pipe, "none", **{"cache": "none", "regions": "none", **features}) as handle:
        pipe(**call, num_inference_steps=3, output_type="latent", callback_on_step_end=look)
        record = handle._runtime.record
    return {"resident": seen[1], "predicted": sum(record.predicted.values()), "counted": sum(record.held.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("wan-14b-layer", "embedded"), default="wan-14b-layer")
    parser.add_argument("--size", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.model == "embedded":
        pipe = load_pipeline("embedded")
        call = {**defaults(pipe), "prompt": "a red circle moving left on black"}
    else:
        pipe = wan_layer()
        text = torch.randn(2, 1, 64, 4096, dtype=torch.bfloat16)
        call = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "num_frames": 13}
        call |= {"height": 512, "width": 512}
    call |= {"width": args.size, "height": args.size} if args.size else {}
    call |= {"num_frames": args.frames} if args.frames else {}
    call = {key: value for key, value in call.items() if key != "num_inference_steps"} | {
        "guidance_scale": args.guidance
    }
    pipe.set_progress_bar_config(disable=True)
    layers = pipe.transformer.config.num_layers
    FEATURES["cache table"] = {"cache": CacheTable.every(3, layers, 1)}
    output = args.output or RESULTS / f"memory_{args.model.replace('-', '_')}.json"
    run(pipe, call, regions=REGIONS)  # what libraries keep for good, of both shapes, is there now
    before = run(pipe, call)["resident"]
    rows = []
    for name, feature in FEATURES.items():
        found = run(pipe, call, **feature)
        row = {
            "feature": name, "predicted": found["predicted"], "counted": found["counted"],
            "process": found["resident"] - before,
        }  # fmt: skip
        rows.append(row)
        off = {key: f"{row[key] / row['predicted'] - 1:+.1%}" for key in ("counted", "process")}
        print(
            f"{name}: predicted {row['predicted'] / 2**20:.1f} MiB, counted {off['counted']}, process {off['process']}"
        )
        result = {
            "machine": detect(), "torch": torch.__version__, "model": args.model, "dtype": str(pipe.transformer.dtype),
            "call": {key: value for key, value in call.items() if "prompt" not in key}, "layers": layers, "rows": rows,
        }  # fmt: skip
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main()
