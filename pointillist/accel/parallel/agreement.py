"""All processes of a job do the same, or all of them stop, soon and with a reason."""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pointillist.accel.parallel import engine
from pointillist.accel.parallel.errors import ParallelError

WAIT = timedelta(seconds=60)
"""So long a process waits for another one to say what it is about to do."""


class Agreement:
    """Between the processes that share a video. Talks over CPUs: nothing waits for a GPU."""

    def __init__(self, config: Any, wait: timedelta | None = None) -> None:
        self._ranks = dist.get_process_group_ranks(engine.process_group(config))
        self._group = dist.new_group(self._ranks, timeout=wait or WAIT, backend="gloo")

    def check(self, facts: Mapping[str, Any]) -> None:
        """Raises ParallelError on every process unless all of them say the same `facts`."""
        said = {name: str(value) for name, value in facts.items()}
        mine = torch.frombuffer(bytearray(hashlib.sha256(repr(said).encode()).digest()), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in self._ranks]
        with engine.telling():
            dist.all_gather(found, mine, group=self._group)
            if all(torch.equal(each, mine) for each in found):
                return
            all_said: list[dict[str, str]] = [{} for _ in self._ranks]
            dist.all_gather_object(all_said, said, group=self._group)
        raise ParallelError(_difference(all_said, self._ranks))

    def first_of(self, value: bool) -> bool:
        """What the first process says."""
        said = torch.tensor([value])
        with engine.telling():
            dist.broadcast(said, self._ranks[0], group=self._group)
        return bool(said)

    def lists_of(self, values: list[float]) -> list[list[float]]:
        """What every process says, in their order."""
        found: list[list[float]] = [[] for _ in self._ranks]
        with engine.telling():
            dist.all_gather_object(found, values, group=self._group)
        return found

    def union(self, flags: torch.Tensor) -> torch.Tensor:
        """bool [n], n may differ: which flags any process has set. On the CPU."""
        length = torch.tensor([len(flags)])
        with engine.telling():
            dist.all_reduce(length, dist.ReduceOp.MAX, group=self._group)
            all_flags = torch.zeros(int(length), dtype=torch.uint8)
            all_flags[: len(flags)] = flags.to("cpu", torch.uint8)
            dist.all_reduce(all_flags, dist.ReduceOp.MAX, group=self._group)
        return all_flags.bool()

    def close(self) -> None:
        """Let go of the connections."""
        dist.destroy_process_group(self._group)


def checksum(tensors: Iterable[Any]) -> str:
    """Of what is in tensors: equal for equal ones. Waits for the device."""
    sums = [
        (tuple(x.shape), float(x.double().sum()), float(x.double().abs().sum()))
        for x in tensors
        if isinstance(x, torch.Tensor) and x.numel()
    ]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:12]


def _difference(said: list[dict[str, str]], ranks: list[int]) -> str:
    """Who says what, of the first fact that differs."""
    names = list(dict.fromkeys(name for each in said for name in each))
    for name in names:
        values = [each.get(name, "nothing") for each in said]
        if len(set(values)) > 1:
            told = "; ".join(f"rank {rank}: {value}" for rank, value in zip(ranks, values, strict=True))
            return (
                f"the processes of this job do not agree on the {name} ({told}), so all stop; start all of them with "
                "the same arguments, files and versions"
            )
    return "the processes of this job do not agree, so all stop"
