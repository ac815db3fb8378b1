"""`pointillist repaint`: from a finished clip, a mask and a new prompt to a clip that differs inside the mask alone."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pointillist.cli.generate import print_files, quieten
from pointillist.cli.progress import show_progress, watch
from pointillist.pipelines.engine import Engine
from pointillist.pipelines.generate import GenerateResult
from pointillist.pipelines.repaint import RepaintRequest


def command(
    clip: Annotated[Path, typer.Argument(help="A clip that `pointillist generate` wrote.")],
    mask: Annotated[
        str,
        typer.Option(
            help="Where it may change: x,y,width,height in pixels, x,y,width,height,first-last with frames from 0, "
            "or a picture or a clip that is white there."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="What the new clip shows, all of it.")],
    output: Annotated[Path, typer.Option(help="FILE.mp4, FILE.gif or FILE.png (a strip).")] = Path("repainted.mp4"),
    strength: Annotated[float, typer.Option(help="Share of the steps that are redone, above 0 to 1.")] = 0.7,
    refresh: Annotated[int, typer.Option(help="Every so many of these steps compute all tokens.")] = 5,
    kept: Annotated[Path | None, typer.Option(help="What `generate --keep` wrote; else where the clip says.")] = None,
    keep: Annotated[Path | None, typer.Option(help="FILE.safetensors: for repainting the new clip again.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; that of the clip if not given.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow fetching a Hub id from the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Render a region of CLIP anew; all other pixels stay as they were."""
    request = RepaintRequest(
        clip=clip, mask=mask, prompt=prompt, output=output, strength=strength, refresh=refresh, kept=kept, keep=keep,
        device=device, download=download,
    )  # fmt: skip
    quieten()
    with Engine() as engine, show_progress(Console(stderr=True)) as show:
        result = watch(engine.submit(request), show)
    if as_json:
        print(json.dumps(result.facts, allow_nan=False))
    else:
        _print_summary(result)


def _print_summary(result: GenerateResult) -> None:
    facts, console = result.facts, Console(soft_wrap=True)
    seconds, steps = facts["seconds"], facts["steps_run"]
    console.print(
        f"{facts['area']:.1%} of the pixels, {facts['tokens_masked']} of {facts['tokens']} tokens; steps: "
        f"{steps['kept']} kept, {steps['all']} of all tokens, {steps['masked']} of the masked ones"
    )
    again = f", of which {seconds['again']:.2f} s to generate the clip again" if seconds["again"] else ""
    console.print(
        f"{facts['computed']:.0%} of the tokens of a whole generation computed; {seconds['total']:.2f} s{again}"
    )
    console.print(f"outside the mask: PSNR {facts['psnr_outside']:.1f} dB (100 is identical)")
    for reason in facts["fallbacks"]:
        console.print(reason)
    print_files(result)
