"""`pointillist app`: the web UI."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pointillist.cli.generate import quieten


def command(
    host: Annotated[str, typer.Option(help="Where to listen; other machines need a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    outputs: Annotated[Path, typer.Option(help="Folder of the clips.")] = Path("outputs"),
    remote: Annotated[str, typer.Option(help="URL of a vLLM-Omni or SGLang server that clips may be asked of.")] = "",
    model: Annotated[list[str] | None, typer.Option(help="Offer this folder or Hub id too. May be repeated.")] = None,
) -> None:
    """Generate, compare and understand, in the browser.

    The password is what POINTILLIST_PASSWORD holds, the user's name is pointillist.
    """
    try:
        from pointillist.web.serve import serve
    except ImportError as error:
        raise ValueError(f"the web UI needs gradio: pip install 'pointillist[web]' ({error})") from error
    quieten()
    print(f"http://{host}:{port}  (Ctrl-C ends it)", flush=True)
    serve(host, port, outputs, os.environ.get("POINTILLIST_PASSWORD"), tuple(model or ()), remote, quiet=True)
