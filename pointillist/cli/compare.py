"""`pointillist compare A B`: how far two files are apart."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pointillist.metrics import compare
from pointillist.pipelines.video import read_clip


def command(
    a: Annotated[Path, typer.Argument(help="A clip.")],
    b: Annotated[Path, typer.Argument(help="Another clip of the same size and length.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare two clips, frame by frame, as decoded: PSNR and SSIM."""
    result = compare(read_clip(a), read_clip(b))
    if as_json:
        print(json.dumps(asdict(result), allow_nan=False))
        return
    print(f"PSNR {result.psnr:.2f} dB (worst frame {min(result.psnr_per_frame):.2f}), SSIM {result.ssim:.4f}")
    if result.identical:
        print("identical")
