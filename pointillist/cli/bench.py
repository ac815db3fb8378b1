"""`pointillist bench`: how fast this machine is, and what step caches of a model go by."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pointillist.files import write_whole

app = typer.Typer(no_args_is_help=True, help="Measure this machine, or calibrate caches.")
DTYPES = ("float32", "bfloat16", "float16")


@app.callback()
def _group() -> None:
    """Measure this machine, or calibrate caches."""


@app.command("attention")
def attention(
    tokens: Annotated[str, typer.Option(help="Lengths, by commas; '' is a list for this device.")] = "",
    head_dim: Annotated[str, typer.Option(help="Head dimensions, by commas.")] = "",
    heads: Annotated[int, typer.Option(min=0, help="0 is a number that suits the length.")] = 0,
    density: Annotated[str, typer.Option(help="Densities, by commas.")] = "1,0.5,0.25,0.125,0.06",
    dtype: Annotated[str, typer.Option(help=f"By commas: {', '.join(DTYPES)}; '' is one for this device.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Measured repetitions; medians count.")] = 5,
    flex: Annotated[bool, typer.Option(help="Also FlexAttention, which compiles for seconds at every length.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda; '' is cuda if there is one.")] = "",
    tune: Annotated[
        bool, typer.Option(help="First find the fastest kernel configurations of this GPU and keep them.")
    ] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="Only measure this machine for the cost model, and write its profile here.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write all of it to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Ours against every dense implementation that runs here, FlexAttention and xformers, in one interleaved run."""
    import torch

    from pointillist.hardware import detect
    from pointillist.kernels import bench, choose_backend

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device!r}; allowed are cpu, cuda and cuda:N")
    where = torch.device(name)
    cuda = where.type == "cuda"
    if cuda and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    lengths = _numbers("tokens", tokens or ("4096,8192,16384,32768,75600,118800" if cuda else "2048,4096,8192"), int)
    dims = _numbers("head-dim", head_dim or ("64,128" if cuda else "64"), int)
    densities = _numbers("density", density, float)
    for option, numbers in (("tokens", lengths), ("head-dim", dims)):
        if min(numbers) < 1:
            raise ValueError(f"--{option} is {numbers}; each must be 1 or more")
    if not all(0 < each <= 1 for each in densities):
        raise ValueError(f"--density is {densities}; each must be above 0 and at most 1")
    names = [each.strip() for each in (dtype or ("bfloat16" if cuda else "float32")).split(",")]
    if set(names) - set(DTYPES):
        raise ValueError(f"--dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    for option, file in (("output", output), ("calibrate", calibrate)):
        if file is not None and (file.suffix != ".json" or file.is_dir() or not os.access(file.parent, os.W_OK)):
            raise ValueError(f"--{option} is {str(file)!r}; it must be a FILE.json in a folder that can be written to")
    progress = Console(stderr=True)
    if calibrate is not None:
        _calibrate(where, names, calibrate, as_json, progress)
        return
    if tune:
        _tune(where, tuple(dims), progress)

    backend, reason = choose_backend(where)
    result: dict[str, Any] = {
        "machine": detect(), "torch": torch.__version__, "threads": torch.get_num_threads(), "backend": backend,
        "backend_reason": reason, "block": bench.BLOCK, "rounds": rounds, "matmul_tflops": {}, "rows": [], "absent": {},
    }  # fmt: skip
    shapes = [(name, dim, length) for name in names for dim in dims for length in lengths]
    for number, (name, dim, length) in enumerate(shapes, 1):
        progress.print(f"[{number}/{len(shapes)}] {length} tokens, head dimension {dim}, {name}", highlight=False)
        kind = getattr(torch, name)
        if name not in result["matmul_tflops"]:
            result["matmul_tflops"][name] = round(bench.matmul_flops(where, kind) / 1e12, 4)
        rows, absent = bench.attention_rows(
            where, length, heads or _heads(length, cuda), dim, kind, densities=tuple(densities), rounds=rounds,
            flex=flex, limit=result["matmul_tflops"][name] * 1e12,
        )  # fmt: skip
        result["rows"] += [asdict(row) for row in rows]
        result["absent"] |= {f"{each} ({length} tokens, {dim}, {name})": why for each, why in absent.items()}
        if output is not None:  # after every shape, so that an interruption loses one
            write_whole(output, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    _print(result)


@app.command("pipeline")
def pipeline(
    model: Annotated[str, typer.Option(help="One of real_sizes.json: wan2.1-1.3b, hunyuanvideo, flux …")],
    plan: Annotated[str, typer.Option(help="auto, quality, balanced, fast, or the file of a plan.")] = "auto",
    hardware: Annotated[
        str, typer.Option(help="Estimate for this machine: h200, rtx4090 … or the file of a profile; '' measures here.")
    ] = "",
    random_weights: Annotated[bool, typer.Option(help="Weights do not matter to time; none are loaded.")] = True,
    layers: Annotated[int, typer.Option(min=0, help="Build so many layers of each kind and scale; 0 is all.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Measured repetitions; medians count.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda; '' is cuda if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}; '' is one for this device.")] = "",
    output: Annotated[Path | None, typer.Option(help="Also write it to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """One denoising step of a model at its true size, dense and accelerated."""
    import torch

    from pointillist.hardware.profile import load_profile
    from pointillist.pipelines.real_size import RealSize, estimated, measured

    if not random_weights:
        raise ValueError("--no-random-weights is not possible: true weights are timed by generate --compare")
    if dtype and dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    found, progress = RealSize.named(model), Console(stderr=True)
    if hardware:
        result = estimated(found, plan, load_profile(hardware), getattr(torch, dtype or "bfloat16"))
    else:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = getattr(torch, dtype or ("float32" if where.type == "cpu" else "bfloat16"))
        result = measured(found, plan, where, kind, layers, rounds, lambda text: progress.print(text, highlight=False))
    if output is not None:
        write_whole(output, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        _print_pipeline(result)


def _print_pipeline(result: dict[str, Any]) -> None:
    seconds, speedup, share = result["seconds"], result["speedup"], result["attention_share"]
    how = "estimated" if result["estimate"] else "measured"
    steps = ", ".join(f"{count} {kind}" for kind, count in result["steps"].items() if count)
    lines = (
        f"{result['model']}, {result['size']}: {result['tokens']:,} tokens, {result['tflop']:.0f} TFLOP a pass, "
        f"{result['parameters'] / 1e9:.1f} B parameters",
        f"{how} for {result['hardware']} in {result['dtype']}, plan {result['plan']!r}",
        f"one step    dense {seconds['dense']:.3g} s, plan {seconds['plan']:.3g} s: {speedup['step']:.2f}×",
        f"attention   {share['dense']:.0%} of a dense step, {share['plan']:.0%} of a sparse one: "
        f"{speedup['attention']:.2f}×",
        f"a clip      dense {result['clip_seconds']['dense']:.4g} s, plan {result['clip_seconds']['plan']:.4g} s: "
        f"{result['clip_speedup']:.2f}× ({steps} steps)",
        f"rate        {result['tflops']['dense']:.4g} TFLOP/s dense",
    )
    for line in lines:
        print(line)
    if not result["estimate"]:
        if result["layers_measured"] < result["layers"]:
            print(f"layers      {result['layers_measured']} of {result['layers']} were measured; times are scaled")
        if result["peak_gib"] is not None:
            print(f"memory      {result['peak_gib']:.1f} GiB at most")


@app.command("cache")
def cache(
    output: Annotated[Path | None, typer.Option(help="The calibration, FILE.json.")] = None,
    model: Annotated[str, typer.Option(help="embedded, a Hub id or a folder.")] = "embedded",
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt in each line, a clip of each.")] = None,
    plan: Annotated[str, typer.Option(help="Of attention, to calibrate with: none (dense), auto or a FILE.")] = "none",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow fetching a Hub id from the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Calibrate the step caches magnitude (MagCache) and modulated (TeaCache) for a model, from a few dense clips."""
    import torch

    from pointillist.cli.generate import quieten
    from pointillist.cli.progress import show_progress
    from pointillist.pipelines.events import Step
    from pointillist.pipelines.load import load_pipeline
    from pointillist.pipelines.search import find_cache_curves, read_prompts

    if output is None or output.suffix != ".json" or output.is_dir() or not os.access(output.parent, os.W_OK):
        given = "missing" if output is None else repr(str(output))
        raise ValueError(f"--output is {given}; it must be a FILE.json in a folder that can be written to")
    texts = None if prompts is None else read_prompts(prompts)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    quieten()
    with show_progress(Console(stderr=True)) as show:

        def progress(phase: str, done: int, of: int) -> None:
            show(Step(phase, done, of))

        progress("loading the model", 0, 0)
        pipe = load_pipeline(model, dtype=getattr(torch, dtype) if dtype else None, device=device, download=download)
        found = find_cache_curves(
            pipe, prompts=texts, plan=plan, progress=progress, num_inference_steps=steps, width=width, height=height,
            num_frames=frames,
        )  # fmt: skip
    found.save(output)
    if as_json:
        about = {"output": str(output), "curve": list(found.curve), "polynomial": found.polynomial}
        print(json.dumps({**about, "spread": found.spread, "prompts": found.prompts}, allow_nan=False))
        return
    caches = ["magnitude"] + ["modulated"] * (found.polynomial is not None)
    print(f"{output}: {len(found.curve)} steps of {found.prompts} clips, which differ by {found.spread:.2g} at most")
    print("use it: " + " or ".join(f"--cache {name}:file={output}" for name in caches))


def _tune(device: Any, head_dims: tuple[int, ...], progress: Console) -> None:
    from pointillist.kernels import bench, choose_backend

    if choose_backend(device)[0] != "triton" or device.type != "cuda":
        raise ValueError(f"--tune finds configurations of Triton kernels on a GPU; this device is {device.type}")
    from pointillist.kernels.triton.configs import architecture_of, save_tuned

    for key, config in bench.tuned_rows(device, head_dims, tokens=16384):
        path = save_tuned(architecture_of(device), {key: config})
        progress.print(f"{key}: {config}, kept in {path}", highlight=False, markup=False)


def _calibrate(device: Any, dtypes: list[str], path: Path, as_json: bool, progress: Console) -> None:
    """Fit a profile to this machine, write it, and say how far off it is."""
    import torch

    from pointillist.search.calibrate import calibrate

    if len(dtypes) != 1:
        raise ValueError(f"--dtype is {','.join(dtypes)}; --calibrate measures one")
    profile = calibrate(
        device, getattr(torch, dtypes[0]), lambda text: progress.print(f"measuring {text}", highlight=False)
    )
    profile.save(path)
    if as_json:
        print(json.dumps({"profile": str(path), "name": profile.name, "error": profile.error}, allow_nan=False))
        return
    print(f"{path}: {profile.name}; held-out shapes and densities are predicted within {profile.error:.1%} on average")


def _heads(tokens: int, cuda: bool) -> int:
    return (24 if tokens <= 16384 else 12 if tokens <= 40000 else 4) if cuda else 4


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"--{name} is {text!r}; it must be {what} separated by commas") from error


def _print(result: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)  # a pipe has no width
    table = Table(title=f"attention on {result['machine']['processor']}, backend {result['backend']}")
    headings = (
        "tokens",
        "heads",
        "dtype",
        "",
        "density",
        "ms",
        "speed-up",
        "of ideal",
        "of own",
        "TFLOP/s",
        "of limit",
    )
    for heading in headings:
        table.add_column(heading, justify="right")

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    for row in result["rows"]:
        table.add_row(
            str(row["tokens"]), f"{row['heads']}×{row['head_dim']}", row["dtype"], row["variant"],
            f"{row['density']:.3g}", f"{row['milliseconds']:.1f}",
            f"{row['speedup']:.2f}×" if row["tflops"] is not None else "", share(row["share_of_ideal"]),
            share(row["share_of_own"]), "" if row["tflops"] is None else f"{row['tflops']:.3g}",
            share(row["share_of_matmul_limit"]),
        )  # fmt: skip
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for name, why in result["absent"].items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        console.print(f"not measured: {', '.join(names)}: {why}", highlight=False, markup=False)
