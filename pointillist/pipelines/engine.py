"""The engine: it carries out jobs, one at a time, on a thread of its own, and tells what happens.

    with Engine() as engine:
        job = engine.submit(GenerateRequest("a red circle moving left on black"))
        for event in job.events():      # Phase, Step, Preview, and last Done, Failed or Cancelled
            ...
        result = job.result()           # or raises what failed

What it does with a request is its `work`: `LocalWork` computes here; another may send requests to a server. Everything
here may be called from any thread.
"""

from __future__ import annotations

import gc
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from pointillist.pipelines.events import (
    Cancelled,
    Done,
    Event,
    Failed,
    JobCancelled,
    Phase,
    Preview,
    Progress,
    Progressed,
    Step,
)
from pointillist.pipelines.failures import explain

QUEUE = 8
"""Jobs that may wait."""
REMEMBERED = 64
"""Jobs that have ended and can still be asked for."""
PREVIEW_SECONDS = 0.5
"""Previews are at least so far apart."""

Work = Callable[[Any, Progress], Any]
"""From a request to its result. It calls its progress at least once in a step, and lets `JobCancelled` pass."""


class QueueFull(ValueError):
    """So many jobs wait that no other may."""


class Job:
    """A request that an engine carries out. Made by `Engine.submit`."""

    def __init__(self, request: Any, previews: bool, owner: str) -> None:
        self.id = uuid.uuid4().hex
        """It cannot be guessed."""
        self.request = request
        self.owner = owner
        """Who has asked, in whatever way the caller tells people apart."""
        self.state = "queued"
        """`queued`, `running`, and at last `done`, `failed` or `cancelled`."""
        self.submitted, self.started, self.ended = time.time(), 0.0, 0.0
        """Seconds since 1970; 0 is not yet."""
        self.latest: Phase | Step | None = None
        """What was told last."""
        self.preview: Preview | None = None
        """The latest one, while the job runs."""
        self._previews, self._previewed = previews, 0.0
        self._cancelled = threading.Event()
        self._log: list[Event | None] = []
        self._changed = threading.Condition()

    @property
    def ended_with(self) -> Done | Failed | Cancelled | None:
        """None before its end."""
        last = self._log[-1] if self._log else None
        return last if isinstance(last, Done | Failed | Cancelled) else None

    @property
    def version(self) -> int:
        """Grows with every event."""
        return len(self._log)

    def cancel(self) -> None:
        """Stop it: at once if it waits, else within one step. What has ended stays as it is."""
        self._cancelled.set()
        with self._changed:
            if self.state == "queued":
                self._end("cancelled", Cancelled())

    def events(self) -> Iterator[Event]:
        """Everything that has happened and will happen, to the end. Of the previews only the latest is kept."""
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._log) > seen)  # noqa: B023 (called at once)
                event = self._log[seen]
            seen += 1
            if event is not None:
                yield event
            if isinstance(event, Done | Failed | Cancelled):
                return

    def result(self) -> Any:
        """Wait for the end. Raises what failed, or JobCancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended_with is not None)
        last = self.ended_with
        if isinstance(last, Failed):
            raise last.error
        if isinstance(last, Cancelled):
            raise JobCancelled("the job was cancelled")
        assert last is not None
        return last.result

    def _run(self, work: Work) -> None:
        with self._changed:
            if self.state != "queued":  # it was cancelled while it waited
                return
            self.state, self.started = "running", time.time()
        try:
            result = work(self.request, self._told)
        except JobCancelled:
            self._end("cancelled", Cancelled())
        except BaseException as error:  # whatever it is, the one who waits must hear of it, and the next job run
            for each in (error, error.__cause__, error.__context__):
                if each is not None:
                    traceback.clear_frames(each.__traceback__)  # they hold tensors
            self._end("failed", Failed(explain(error), error))
        else:
            self._end("done", Done(result))

    def _told(self, event: Progressed) -> None:
        if self._cancelled.is_set():
            raise JobCancelled("the job was cancelled")
        self.latest = event
        self._append(event)
        if self._previews and isinstance(event, Step) and event.look is not None:
            now = time.monotonic()
            if now - self._previewed >= PREVIEW_SECONDS:
                self._previewed = now
                frames = event.look()
                if frames is not None:
                    self._show(Preview(event.step, event.steps, frames))

    def _show(self, preview: Preview) -> None:
        with self._changed:
            self._log = [None if isinstance(each, Preview) else each for each in self._log]
            self.preview = preview
        self._append(preview)

    def _append(self, event: Event) -> None:
        with self._changed:
            self._log.append(event)
            self._changed.notify_all()

    def _end(self, state: str, last: Event) -> None:
        with self._changed:
            self.state, self.ended, self.preview = state, time.time(), None
            self._append(last)


class Engine:
    """Jobs, one at a time, first come, first served."""

    def __init__(self, work: Work | None = None, queue: int = QUEUE) -> None:
        """`work` is what is done with a request, by default `LocalWork()`; so many jobs may wait."""
        self._work: Work = LocalWork() if work is None else work
        self._most = queue
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._serve, name="pointillist-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Any, previews: bool = False, owner: str = "") -> Job:
        """Let a request wait for its turn; `previews` of it are made.

        Raises:
            QueueFull: so many wait already.
        """
        with self._changed:
            waiting = self.waiting
            if len(waiting) >= self._most:
                raise QueueFull(f"{len(waiting)} jobs wait already, which is the limit; wait, or cancel one of them")
            if self._closed:
                raise QueueFull("the engine is closed; start it again")
            job = Job(request, previews, owner)
            self._waiting.append(job)
            self._jobs[job.id] = job
            ended = [each.id for each in self._jobs.values() if each.ended_with is not None]
            for old in ended[: max(0, len(ended) - REMEMBERED)]:
                del self._jobs[old]
            self._changed.notify_all()
        return job

    def job(self, name: str | None) -> Job | None:
        """The job of this id; None if there is none, or it ended long ago."""
        return self._jobs.get(name or "")

    @property
    def jobs(self) -> list[Job]:
        """All that are known, oldest first."""
        with self._changed:
            return list(self._jobs.values())

    @property
    def running(self) -> Job | None:
        """The job of this moment."""
        return self._running

    @property
    def waiting(self) -> list[Job]:
        """Jobs whose turn has not come, next first."""
        with self._changed:
            return [job for job in self._waiting if job.state == "queued"]

    def place(self, job: Job) -> int:
        """How many jobs come before it; 0 for one that runs or has ended."""
        waiting = self.waiting
        return waiting.index(job) + (self._running is not None) if job in waiting else 0

    def close(self) -> None:
        """Cancel everything and wait until it has stopped."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                job.cancel()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._running = self._waiting.pop(0)
            self._running._run(self._work)
            ended = self._running
            self._running = None
            if ended.state == "failed":
                _free_memory()


class LocalWork:
    """Computes on this machine, and keeps the pipeline of the last job for the next one."""

    def __init__(self) -> None:
        self._name: tuple[Any, ...] = ()
        self._pipe: Any = None
        self._scheduler: Any = None

    def __call__(self, request: Any, progress: Progress) -> Any:
        from pointillist.pipelines.generate import GenerateRequest, generate
        from pointillist.pipelines.inspect import InspectRequest, inspect
        from pointillist.pipelines.remote import RemoteRequest, generate_there
        from pointillist.pipelines.repaint import RepaintRequest, repaint
        from pointillist.pipelines.search import SearchRequest, search

        kinds: dict[type, Callable[..., Any]] = {
            GenerateRequest: generate,
            RepaintRequest: repaint,
            SearchRequest: search,
            InspectRequest: inspect,
            RemoteRequest: generate_there,
        }
        if type(request) not in kinds:
            raise TypeError(f"a {type(request).__name__} is no request; {', '.join(k.__name__ for k in kinds)} are")
        try:
            return kinds[type(request)](request, progress, self.load)
        except (JobCancelled, ValueError, OSError):
            raise
        except BaseException:  # the pipeline may be in any state, and may fill the memory
            self._pipe = None
            raise

    def load(self, name: str = "embedded", **how: Any) -> Any:
        """`load_pipeline`, or what it gave the last time if that was for the same arguments."""
        from pointillist.pipelines.load import load_pipeline

        key = (name, *sorted((option, str(value)) for option, value in how.items() if option != "download"))
        if self._pipe is None or key != self._name:
            self._pipe = None  # two may not fit into memory
            self._pipe, self._name = load_pipeline(name, **how), key
            self._scheduler = self._pipe.scheduler
        self._pipe.scheduler = self._scheduler  # a request may have given it another
        return self._pipe


def _free_memory() -> None:
    """What a failed job has left, before the next one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
