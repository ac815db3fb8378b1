"""What happens while a job is carried out. The command line and the web UI show the same events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Phase:
    """Something begins that has no steps, such as loading the model."""

    phase: str
    """In words that can be shown."""


@dataclass(frozen=True)
class Step:
    """Of a phase with steps, so many are done; 0 when it begins."""

    phase: str
    step: int
    steps: int
    seconds_per_step: float | None = None
    look: Callable[[], np.ndarray | None] | None = None
    """Makes a preview of what there is by now, uint8 [F, h, w, 3]; None where it cannot. Call it at once, or never."""


@dataclass(frozen=True)
class Preview:
    """What the clip looks like after so many steps."""

    step: int
    steps: int
    frames: np.ndarray
    """uint8 [F, h, w, 3], one for each latent frame, in the size of the latents."""


@dataclass(frozen=True)
class Done:
    """The job is done."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """The job has failed."""

    sentence: str
    """What happened, and the next step to try."""
    error: BaseException


@dataclass(frozen=True)
class Cancelled:
    """The job was cancelled, waiting or within one step; nothing was written."""


Progressed = Phase | Step
Event = Phase | Step | Preview | Done | Failed | Cancelled
Progress = Callable[[Progressed], None]
"""How work tells of itself. It raises `JobCancelled` when it should stop: let that pass."""


class JobCancelled(Exception):
    """Somebody has cancelled the job."""


def silent(event: Progressed) -> None:
    """Tell nobody."""
