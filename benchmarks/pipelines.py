"""Models at their true size with random weights: what a denoising step takes, dense and with the family's preset.

    python benchmarks/pipelines.py                     estimates for several GPUs, from counts on `meta`
    python benchmarks/pipelines.py --measure           on the GPU of this machine
    python benchmarks/pipelines.py table               the results as Markdown

Results: benchmarks/results/pipelines_estimated.json, pipelines_measured.json.
"""

import argparse
import json
from pathlib import Path

import torch

from pointillist.files import write_whole
from pointillist.hardware.profile import load_profile
from pointillist.pipelines.real_size import FILE, RealSize, estimated, measured

RESULTS = Path(__file__).parent / "results"
HARDWARE = ("h200", "h100", "rtx4090")


def estimates() -> None:
    """Of all models, for all machines."""
    rows = []
    for name in json.loads(FILE.read_text(encoding="utf-8")):
        for hardware in HARDWARE:
            rows.append(estimated(RealSize.named(name), "auto", load_profile(hardware), torch.bfloat16))
            print(name, hardware, f"{rows[-1]['speedup']['step']:.2f}×", flush=True)
    write_whole(RESULTS / "pipelines_estimated.json", (json.dumps(rows, indent=1) + "\n").encode())


def measurements(layers: int) -> None:
    """Of all models, here; each is kept at once."""
    device, rows = torch.device("cuda"), []
    for name in json.loads(FILE.read_text(encoding="utf-8")):
        rows.append(measured(RealSize.named(name), "auto", device, torch.bfloat16, layers, 3, print))
        rows[-1]["gpu"] = torch.cuda.get_device_name(device)
        write_whole(RESULTS / "pipelines_measured.json", (json.dumps(rows, indent=1) + "\n").encode())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def table(file: Path) -> str:
    """The results as Markdown."""
    lines = [
        "| model | size | tokens | TFLOP a pass | machine | step, dense | preset | attention | step | a clip |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(file.read_text(encoding="utf-8")):
        seconds, speedup = row["seconds"], row["speedup"]
        lines.append(
            f"| {row['model']} | {row['size']} | {row['tokens']:,} | {row['tflop']:.0f} | {row['hardware']} "
            f"| {seconds['dense']:.3g} s | {seconds['plan']:.3g} s | {speedup['attention']:.2f}× "
            f"| {speedup['step']:.2f}× | {row['clip_speedup']:.2f}× |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU")
    parser.add_argument("--layers", type=int, default=0, help="build so many of each kind, and scale; 0 is all")
    args = parser.parse_args()
    if args.command == "table":
        print(table(RESULTS / f"pipelines_{'measured' if args.measure else 'estimated'}.json"))
    elif args.measure:
        measurements(args.layers)
    else:
        estimates()


if __name__ == "__main__":
    main()
