"""`pointillist env`: this machine, the versions, the backends."""

import json
from typing import Annotated

import typer
from rich.console import Console

from pointillist.pipelines.environment import describe


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what a report of a problem should contain."""
    facts = describe()
    if as_json:
        print(json.dumps(facts))
        return
    Console().print_json(json.dumps(facts))
