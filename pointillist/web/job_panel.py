"""The panel of a running job: phase, step, pace, time left, place in the queue, preview, Cancel.

It asks the engine twice a second while a job of this browser waits or runs, so it finds the job again after a reload,
and a closed page stops nothing.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from pointillist.pipelines.engine import Engine, Job
from pointillist.pipelines.events import Done, Failed, Phase, Step
from pointillist.web.preview import strip
from pointillist.web.shared import Shared

TICK = 0.4
"""Seconds."""


class JobPanel:
    """Draws itself where it is made.

    A tab's start button returns `panel.begin(job)` into `panel.begun`, or `panel.refuse(sentence)`:

        panel = JobPanel(engine, shared, "search", finished=show, outputs=[curve, chooser])
        button.click(start, [speed], panel.begun)
    """

    def __init__(
        self,
        engine: Engine,
        shared: Shared,
        name: str,
        finished: Callable[[Job], Sequence[Any]],
        outputs: Sequence[Any],
        progressed: Callable[[Job], Sequence[Any]] | None = None,
    ) -> None:
        """
        Args:
            name: of the panel, for the browser's memory and for elem_ids: `job-NAME`, `cancel-NAME`.
            finished: called once with a job that is done; gives the values of `outputs`. Also after a reload.
            progressed: called with the running job whenever it has told something; likewise. None: they stay.
        """
        self._engine, self._finished, self._progressed = engine, finished, progressed
        self._outputs = list(outputs)
        self._tickets = gr.BrowserState([], storage_key=f"pointillist-jobs-{name}", secret="pointillist")
        self._new, self._seen = gr.State(""), gr.State(0)
        self._status = gr.HTML("", elem_id=f"job-{name}", elem_classes="job-status")
        self._cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id=f"cancel-{name}", size="sm")
        self._timer = gr.Timer(TICK, active=False)
        self.begun: list[Any] = [self._new, self._seen, self._status, self._cancel, self._timer]
        """What `begin` and `refuse` give values of."""
        mine = [self._tickets, self._new]
        watched = [self._tickets, *self.begun, *self._outputs]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self._timer.tick(self._look, [*mine, self._seen], watched, trigger_mode="once", **quiet)
        shared.page.load(self._found_again, self._tickets, self.begun, **quiet)
        self._cancel.click(self._stop, mine, self._cancel, **quiet)

    def begin(self, job: Job) -> list[Any]:
        """Watch this job from now on; earlier ones of this browser come first."""
        return [job.id, 0, self._words(job), gr.Button("Cancel", visible=True, interactive=True), gr.Timer(active=True)]

    def refuse(self, sentence: str) -> list[Any]:
        """Say why no job was begun; one that runs is watched further."""
        return [gr.skip(), gr.skip(), failure(sentence), gr.skip(), gr.skip()]

    def _jobs(self, tickets: list[str], new: str = "") -> list[Job]:
        """Those that were begun here and whose end was not shown, first come first."""
        names = [*tickets, *([new] if new and new not in tickets else [])]
        return [job for name in names if (job := self._engine.job(name)) is not None]

    def _found_again(self, tickets: list[str]) -> list[Any]:
        """After the page was loaded."""
        jobs = self._jobs(tickets)
        return ["", *self.begin(jobs[0])[1:]] if jobs else [gr.skip()] * 5

    def _look(self, tickets: list[str], new: str, seen: int) -> list[Any]:
        unchanged = [gr.skip()] * len(self._outputs)
        jobs = self._jobs(tickets, new)
        if not jobs:
            return [[], "", 0, gr.skip(), gr.Button(visible=False), gr.Timer(active=False), *unchanged]
        job, others = jobs[0], len(jobs) - 1
        ended, version, words = job.ended_with, job.version, self._words(job)
        if ended is None:
            told = version != seen and self._progressed is not None and job.state == "running"
            new_values = list(self._progressed(job)) if told and self._progressed is not None else unchanged
            more = f'<div class="job-more">and {others} of yours after it</div>' if others else ""
            names = [each.id for each in jobs]
            kept = gr.skip() if names == tickets else names
            return [kept, gr.skip(), version, words + more, gr.skip(), gr.skip(), *new_values]
        left = [each.id for each in jobs[1:]]
        button = gr.Button("Cancel", visible=bool(left), interactive=True)
        results = self._finished(job) if isinstance(ended, Done) else unchanged
        return [left, "" if job.id == new else gr.skip(), 0, words, button, gr.Timer(active=bool(left)), *results]

    def _stop(self, tickets: list[str], new: str) -> Any:
        for job in self._jobs(tickets, new)[:1]:
            job.cancel()
        return gr.Button("Cancelling …", interactive=False)

    def _words(self, job: Job) -> str:
        """The status as HTML."""
        ended = job.ended_with
        if isinstance(ended, Failed):
            return failure(ended.sentence)
        if job.state == "cancelled":
            return '<div class="job-line">Cancelled. Nothing was written.</div>'
        if isinstance(ended, Done):
            return f'<div class="job-line">Done in {duration(job.ended - job.started)}.</div>'
        if job.state == "queued":
            before = self._engine.place(job)
            return f'<div class="job-line">Waiting: {before} {"job" if before == 1 else "jobs"} before this one.</div>'
        return running(job)


def running(job: Job) -> str:
    """Of a job that runs: its phase, step, pace and time left, a bar, and the latest preview."""
    now, preview = job.latest, job.preview
    words, share = (now.phase if isinstance(now, Phase | Step) else "starting"), None
    if isinstance(now, Step) and now.steps:
        words += f" · step {now.step}/{now.steps}"
        share = now.step / now.steps
        if now.seconds_per_step:
            left = now.seconds_per_step * (now.steps - now.step)
            words += f" · {now.seconds_per_step:.2f} s/step · {duration(left)} left"
    bar = f'<i style="width:{share:.1%}"></i>' if share is not None else '<i class="unknown"></i>'
    elapsed = duration(time.time() - job.started)
    line = f'<div class="job-line"><span>{html.escape(words)}</span><span class="job-time">{elapsed}</span></div>'
    return f'{line}<div class="job-bar">{bar}</div>{strip(preview) if preview is not None else ""}'


def failure(sentence: str) -> str:
    """A sentence that says what failed."""
    return f'<div class="job-failed" role="alert">{html.escape(sentence)}</div>'


def duration(seconds: float) -> str:
    """In words, like `8.2 s` or `3 min 20 s`."""
    if seconds < 60:
        return f"{max(0.0, seconds):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
