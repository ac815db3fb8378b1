"""Progress of a generation on stderr: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from pointillist.pipelines.generate import Event


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[Event], None]]:
    """Yields the function to call with every event."""
    if not console.is_terminal:
        yield lambda event: console.print(_line(event), highlight=False, soft_wrap=True)
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, pace="")

        def show(event: Event) -> None:
            pace = f"{event.seconds_per_step:.2f} s/step" if event.seconds_per_step else ""
            if event.phase != bar.tasks[0].description:
                bar.reset(task)  # or the clock of a finished phase would stand still in the next one
            bar.update(task, description=event.phase, completed=event.step, total=event.steps or None, pace=pace)

        yield show


def _line(event: Event) -> str:
    if not event.steps:
        return event.phase
    line = f"{event.phase} {event.step}/{event.steps}"
    if event.seconds_per_step:
        left = event.seconds_per_step * (event.steps - event.step)
        line += f", {event.seconds_per_step:.2f} s/step, {left:.0f} s left"
    return line
