"""What torchrun tells a process of the job that it belongs to."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """What torchrun tells a process."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0


def this_job() -> Job:
    """Of this process; one of one where nobody says otherwise."""
    rank, processes, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Job() if processes is None else Job(int(rank or 0), int(processes), int(local or 0))
