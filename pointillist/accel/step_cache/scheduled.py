"""The plan's schedule says which steps are cached: found by a search, the same for every prompt, no decision costs."""

from dataclasses import dataclass
from typing import ClassVar

from pointillist.accel.step_cache.decider import Decider, Seen


@dataclass(frozen=True)
class Scheduled(Decider):
    NAME: ClassVar[str] = "schedule"
    ADAPTIVE: ClassVar[bool] = False

    def reuse(self, seen: Seen) -> bool:
        return True  # asked only where the schedule says `cached`
