"""The command line. `main` is the entry point; one file per command."""

import os
import sys
from collections.abc import Sequence

import typer

from pointillist.accel.parallel.errors import ParallelError
from pointillist.cli import app as web_app
from pointillist.cli import bench, compare, env, generate, plan, repaint, search
from pointillist.pipelines.failures import explain

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer carries its own copy of click

INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make Diffusers video pipelines faster with sparse attention.",
)
app.command("generate")(generate.command)
app.command("repaint")(repaint.command)
app.command("compare")(compare.command)
app.command("env")(env.command)
app.command("app")(web_app.command)
app.add_typer(plan.app, name="plan")
app.add_typer(bench.app, name="bench")
app.add_typer(search.app, name="search")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted; errors are one sentence."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        result = typer.main.get_command(app).main(
            list(arguments) if arguments is not None else None, prog_name="pointillist", standalone_mode=False
        )
        if result == INTERRUPTED:  # typer turns Ctrl-C into this code
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except UsageError as error:
        return _fail(f"{error.format_message()} Try --help.", 2)  # type: ignore[attr-defined]
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted; no file is half-written, and a search goes on by the same command", INTERRUPTED)
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("POINTILLIST_DEBUG") == "1":
            raise
        from pointillist.accel.plan import PlanError
        from pointillist.pipelines.load import ModelError
        from pointillist.search.errors import SearchError

        usage = isinstance(error, ValueError) and not isinstance(error, (PlanError, ModelError, SearchError))
        return _fail(explain(error), 2 if usage else 1)
    except ParallelError as error:
        return _fail(str(error), 1)
    except Exception as error:
        if os.environ.get("POINTILLIST_DEBUG") == "1":
            raise
        return _fail(explain(error), 1)


def _fail(message: str, code: int) -> int:
    rank = os.environ.get("RANK")
    who = "pointillist" if rank is None else f"pointillist, rank {rank}"
    print(f"{who}: {message}", file=sys.stderr)
    return code
