"""`pointillist plan`: look at plan files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look at plan files.")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A plan file.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what is in a plan."""
    from pointillist.accel.plan import Plan

    plan = Plan.load(file)
    if as_json:
        print(json.dumps(asdict(plan), allow_nan=False))
        return
    for name, value in asdict(plan).items():
        print(f"{name:<17} {value}")


@app.command()
def validate(file: Annotated[Path, typer.Argument(help="A plan file.")]) -> None:
    """Check a plan: exit 0 if it is valid, 1 with the reason if not."""
    from pointillist.accel.plan import Plan

    Plan.load(file)
    print(f"{file} is a valid plan")
