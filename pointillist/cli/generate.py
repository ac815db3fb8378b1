"""`pointillist generate`: from a prompt to a clip."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pointillist.accel.parallel.job import this_job
from pointillist.accel.patterns import PATTERNS
from pointillist.cli.progress import show_progress, watch
from pointillist.pipelines.embedded.vocabulary import KNOWN_WORDS, unknown_words
from pointillist.pipelines.engine import Engine
from pointillist.pipelines.generate import GenerateRequest, GenerateResult, generate
from pointillist.pipelines.remote import RemoteWork


def command(
    prompt: Annotated[str, typer.Argument(help="What the clip shows.")],
    output: Annotated[Path, typer.Option(help="FILE.mp4, FILE.gif or FILE.png (a strip).")] = Path("output.mp4"),
    model: Annotated[str, typer.Option(help="embedded, a Hub id or a folder.")] = "embedded",
    negative_prompt: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same clip. Random if not given, and reported.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the sigma schedule.")] = None,
    fps: Annotated[int, typer.Option(help="Frames per second of the file.")] = 16,
    speed: Annotated[str | None, typer.Option(help="exact, quality, balanced (default) or fast.")] = None,
    plan: Annotated[str | None, typer.Option(help="auto, none or a plan file.")] = None,
    pattern: Annotated[str | None, typer.Option(help=f"One pattern everywhere: {', '.join(PATTERNS)}.")] = None,
    density: Annotated[
        float | None, typer.Option(help="With --pattern: kept share of the pairs, above 0 to 1.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="With --pattern: an option of it, like order=gilbert. May be repeated.")
    ] = None,
    tail: Annotated[
        str, typer.Option(help="With --pattern: none, pooled, rectified, rescaled or default.")
    ] = "default",
    dense: Annotated[
        str, typer.Option(help="Attention of dense calls: auto, fastest, native, flash, xformers …")
    ] = "auto",
    cache: Annotated[
        str,
        typer.Option(
            help="Reuse steps: auto (the plan's), none, easy, rate, first_block, magnitude, modulated; "
            "with options like rate:threshold=0.1,predictor=taylor. Or modules: table (the model's), table:FILE.json."
        ),
    ] = "auto",
    regions: Annotated[
        str,
        typer.Option(
            help="Compute some of the tokens in some steps: auto (the plan's), none, easy, change, low_std, high_std; "
            "with options like change:share=0.25,every=4."
        ),
    ] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Also run dense with the same seed, and compare.")] = False,
    keep: Annotated[
        Path | None, typer.Option(help="FILE.safetensors: keep what repaint needs, so that it need not generate again.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow fetching a Hub id from the network.")] = False,
    remote: Annotated[
        str | None, typer.Option(help="URL of a vLLM-Omni or SGLang server that makes the clip, in its own ways.")
    ] = None,
    ulysses: Annotated[
        int, typer.Option(help="Under torchrun: so many processes exchange heads. Times --ring, all processes.")
    ] = 1,
    ring: Annotated[
        int, typer.Option(help="Under torchrun: so many groups show each other their keys; for patterns of the grid.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Generate a clip from PROMPT, accelerated."""
    request = GenerateRequest(
        prompt=prompt, output=output, model=model, negative_prompt=negative_prompt, steps=steps, seed=seed,
        width=width, height=height, frames=frames, guidance=guidance, shift=shift, fps=fps, speed=speed, plan=plan,
        pattern=pattern, density=density, options=tuple(option or ()), tail=tail, dense=dense, cache=cache,
        regions=regions, compare=compare, keep=keep, device=device, dtype=dtype, download=download, ulysses=ulysses,
        ring=ring,
    )  # fmt: skip
    quieten()
    if this_job().rank:  # the first process of a job speaks for all
        generate(request)
        return
    if remote is None:
        _hint_at_words(request)
    console = Console(stderr=True)
    with Engine(None if remote is None else RemoteWork(remote)) as engine, show_progress(console) as show:
        result = watch(engine.submit(request), show)
    if as_json:
        print(json.dumps(result.facts, allow_nan=False))
    elif remote is not None:
        print(f"made by {result.facts['remote']['server']} in {result.facts['seconds']['total']:.1f} s")
        print_files(result)
    else:
        _print_summary(result)


def _hint_at_words(request: GenerateRequest) -> None:
    unknown = unknown_words(request.prompt) if request.model == "embedded" else []
    if unknown:
        print(
            f"hint: the embedded model does not know {', '.join(unknown)}; it knows {', '.join(sorted(KNOWN_WORDS))}",
            file=sys.stderr,
        )


def quieten() -> None:
    """Other libraries' notes would tear the progress lines apart."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _print_summary(result: GenerateResult) -> None:
    facts: dict[str, Any] = result.facts
    table = Table(title=f"{facts['tokens']} tokens, {facts['steps']} steps, seed {facts['seed']}")
    table.add_column("")
    columns = [("accelerated", facts["seconds"])]
    if "dense_seconds" in facts:
        columns = [("dense", facts["dense_seconds"]), *columns]
    for name, _ in columns:
        table.add_column(name, justify="right")
    if "speedup" in facts:
        table.add_column("speed-up", justify="right")
    for key, label in (("attention", "attention"), ("denoise", "denoising"), ("total", "in total")):
        cells = [f"{seconds[key]:.2f} s" for _, seconds in columns]
        table.add_row(label, *cells, *([f"{facts['speedup'][key]:.2f}×"] if "speedup" in facts else []))
    console = Console(soft_wrap=True)
    console.print(table)
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["steps_run"].items() if count)
    density = f", density {facts['density']:.3f}" if facts["density"] is not None else ""
    console.print(f"plan {facts['plan']} ({facts['plan_source']}); {kinds} steps{density}; backend {facts['backend']}")
    for reason in facts["fallbacks"]:
        console.print(reason)
    if "psnr" in facts:
        console.print(f"against dense: PSNR {facts['psnr']:.2f} dB, SSIM {facts['ssim']:.4f}")
    print_files(result)


def print_files(result: GenerateResult) -> None:
    """Where everything was written."""
    for name, path in result.files.items():
        print(f"{name}: {path}")
    if "kept" in result.facts:
        print(f"kept: {result.facts['kept']} ({result.facts['kept_bytes'] / 2**20:.1f} MiB)")
