"""`pointillist search`: from a model, a machine and a wish to a plan file."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pointillist.cli.generate import quieten
from pointillist.cli.progress import show_progress, watch
from pointillist.pipelines.engine import Engine
from pointillist.pipelines.events import Step
from pointillist.pipelines.search import SearchRequest

if TYPE_CHECKING:
    from pointillist.search.find import Found

app = typer.Typer(invoke_without_command=True, help="Find the plan that fits a model, a machine and a wish.")


@app.callback()
def search(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option(help="The plan, FILE.safetensors.")] = None,
    model: Annotated[str, typer.Option(help="embedded, a Hub id or a folder.")] = "embedded",
    hardware: Annotated[
        str, typer.Option(help="auto (this machine, measured), h100, rtx4090 … or a profile's FILE.json.")
    ] = "auto",
    target_speedup: Annotated[float | None, typer.Option(help="Denoising so many times as fast.")] = None,
    min_psnr: Annotated[float | None, typer.Option(help="At least so many dB against dense clips.")] = None,
    speed: Annotated[str, typer.Option(help="If neither is given: quality, balanced or fast.")] = "balanced",
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt in each line, to calibrate on.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Likewise, to run plans on.")] = None,
    verify: Annotated[bool, typer.Option(help="Run plans and correct predictions; without it they must do.")] = True,
    stages: Annotated[bool, typer.Option("--stages", help="Choose anew for early, middle and late steps.")] = False,
    cache: Annotated[bool, typer.Option(help="Steps may reuse what others computed.")] = True,
    cache_table: Annotated[
        bool, typer.Option("--cache-table", help="Learn which modules to reuse in which steps, FILE.json, not a plan.")
    ] = False,
    share: Annotated[
        float | None, typer.Option(help="With --cache-table: of the modules, reuse so many (0.5).")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="With --cache-table, in place of --share: a module's cost.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="With --cache-table: measured (what reusing a module costs), or noise.")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="With --cache-table: clips to learn with (0; from noise 200).")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="With --cache-table: of learning (0.05).")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: measure only part i of n; `search merge` makes the plan of all.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="For what is measured; OUTPUT.search by default. Resumes what is there.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow fetching a Hub id from the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Search a plan. What is measured is kept in a folder, and an interrupted search goes on there."""
    if context.invoked_subcommand is not None:
        return
    how = {"share": share, "beta": beta, "start": start, "iterations": iterations, "rate": rate}
    if not cache_table and any(value is not None for value in how.values()):
        raise ValueError(
            "--share, --beta, --start, --iterations and --rate say how a --cache-table is learned; give that too"
        )
    output = _checked(output, ".json" if cache_table else ".safetensors")
    if cache_table:
        if target_speedup is not None or min_psnr is not None or shard is not None or stages:
            raise ValueError("--target-speedup, --min-psnr, --stages and --shard are of plans, not of a --cache-table")
        size = {"num_inference_steps": steps, "width": width, "height": height, "num_frames": frames}
        load = {"device": device, "dtype": dtype, "download": download}
        _learn(output, folder or output.with_suffix(".search"), model, prompts, how, size, load, as_json)
        return
    request = SearchRequest(
        output, folder or output.with_suffix(".search"), model=model, hardware=hardware, target_speedup=target_speedup,
        min_psnr=min_psnr, speed=speed, prompts=None if prompts is None else str(prompts.resolve()),
        held_out=None if held_out is None else str(held_out.resolve()), verify=verify, stages=stages, cache=cache,
        steps=steps, width=width, height=height, frames=frames, device=device, dtype=dtype, download=download,
        shard=_parsed(shard),
    )  # fmt: skip
    _run(request, as_json)


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="Where all shards of a search lie.")],
    output: Annotated[Path | None, typer.Option(help="The plan, FILE.safetensors.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Make the plan of a search whose shards were measured by several processes or machines."""
    from pointillist.search.errors import SearchError

    output, request = _checked(output), folder / "request.json"
    if not request.is_file():
        raise SearchError(f"{folder} holds no search; give the folder that --shard wrote to")
    asked = json.loads(request.read_text(encoding="utf-8"))
    _run(SearchRequest(output, folder, merging=True, **asked), as_json)


def _learn(
    output: Path,
    folder: Path,
    model: str,
    prompts: Path | None,
    how: dict[str, Any],
    size: dict[str, Any],
    load: dict[str, Any],
    as_json: bool,
) -> None:
    """A cache table."""
    import torch

    from pointillist.pipelines.load import load_pipeline
    from pointillist.pipelines.search import find_cache_table, read_prompts
    from pointillist.search.cache_table import Learning

    chosen = {name: value for name, value in how.items() if value is not None}
    if "beta" in chosen:
        chosen.setdefault("share", None)
        chosen.setdefault("start", "noise")
    if chosen.get("start") == "noise":
        chosen.setdefault("iterations", 200)
    texts = None if prompts is None else read_prompts(prompts)
    Learning(("",), {}, **chosen)  # what is wrong is told before a model is loaded
    kind = getattr(torch, load["dtype"]) if load["dtype"] else None
    quieten()
    with show_progress(Console(stderr=True)) as show:

        def progress(phase: str, done: int, of: int) -> None:
            show(Step(phase, done, of))

        progress("loading the model", 0, 0)
        pipe = load_pipeline(model, dtype=kind, device=load["device"], download=load["download"])
        folder.mkdir(parents=True, exist_ok=True)
        table = find_cache_table(
            pipe, prompts=texts, checkpoint=folder / "cache_table.safetensors", name=output.stem, progress=progress,
            **chosen, **size,
        )  # fmt: skip
        table.save(output)
    if as_json:
        print(json.dumps({"output": str(output), "share": table.share, "folder": str(folder)}, allow_nan=False))
    else:
        print(f"{output}: {table.share:.0%} of the modules are reused\nuse it: --cache table:{output}")


def _run(request: SearchRequest, as_json: bool) -> None:
    quieten()
    with Engine() as engine, show_progress(Console(stderr=True)) as show:
        result = watch(engine.submit(request), show)
    if result.found is None:
        assert request.shard is not None
        part = f"shard {request.shard[0] + 1} of {request.shard[1]}"
        print(json.dumps({"folder": str(request.folder)}) if as_json else f"{part}: {request.folder}")
    else:
        _tell(result.found, request.output, request.folder, as_json)


def _tell(found: "Found", output: Path, folder: Path, as_json: bool) -> None:
    facts: dict[str, Any] = {
        "output": str(output), "plan": found.plan.name, "predicted": found.plan.predicted,
        "measured": found.plan.measured, "seconds": found.record.seconds, "folder": str(folder),
    }  # fmt: skip
    if as_json:
        print(json.dumps(facts, allow_nan=False))
        return
    for what in ("predicted", "measured"):
        figures = ", ".join(f"{name} {value:g}" for name, value in facts[what].items())
        print(f"{what}: {figures or 'nothing'}")
    print(f"{output}\nlook at it: pointillist plan show {output} --html {output.with_suffix('.html')}")


def _checked(output: Path | None, suffix: str = ".safetensors") -> Path:
    if output is None:
        raise ValueError(f"--output is missing; give a FILE{suffix}")
    if output.suffix != suffix or output.is_dir():
        raise ValueError(f"--output is {str(output)!r}; it must be a FILE{suffix}")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {str(output)!r}, but there is no folder {str(output.parent)!r}; make it first")
    return output


def _parsed(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard is {shard!r}; it must be i/n with i from 1 to n, for example 1/3")
    return int(match[1]) - 1, int(match[2])
