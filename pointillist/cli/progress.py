"""Progress of a generation on stderr: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from pointillist.pipelines.engine import Job
from pointillist.pipelines.events import Event, Phase, Progressed, Step


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[Event], None]]:
    """Yields the function to call with every event."""
    if not console.is_terminal:

        def tell(event: Event) -> None:
            if isinstance(event, Phase | Step):
                console.print(_line(event), highlight=False, soft_wrap=True)

        yield tell
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, pace="")

        def show(event: Event) -> None:
            if not isinstance(event, Phase | Step):
                return
            at = event if isinstance(event, Step) else Step(event.phase, 0, 0)
            step, steps, each = at.step, at.steps, at.seconds_per_step
            pace = f"{each:.2f} s/step" if each else ""
            if event.phase != bar.tasks[0].description:
                bar.reset(task)  # or the clock of a finished phase would stand still in the next one
            bar.update(task, description=event.phase, completed=step, total=steps or None, pace=pace)

        yield show


def _line(event: Progressed) -> str:
    if not isinstance(event, Step) or not event.steps:
        return event.phase
    line = f"{event.phase} {event.step}/{event.steps}"
    if event.seconds_per_step:
        left = event.seconds_per_step * (event.steps - event.step)
        line += f", {event.seconds_per_step:.2f} s/step, {left:.0f} s left"
    return line


def watch(job: Job, show: Callable[[Event], None]) -> Any:
    """Show a job to its end, and return its result. Raises what failed."""
    for event in job.events():
        show(event)
    return job.result()
