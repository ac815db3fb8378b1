"""A request that several processes carry out together, started by torchrun: all do the same, the first one writes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pointillist.accel.parallel.job import Job, this_job


def check_degrees(ulysses: int, ring: int) -> None:
    """Raises ValueError unless as many processes were started as a video is to be split over."""
    if ulysses < 1 or ring < 1:
        raise ValueError(f"--ulysses {ulysses} and --ring {ring} are not possible; they are whole numbers from 1")
    count, wanted = this_job().processes, ulysses * ring
    if count == wanted:
        return
    if count == 1:
        raise ValueError(
            f"--ulysses {ulysses} and --ring {ring} split a video over {wanted} processes, and this is one; start it "
            f"with torchrun --nproc-per-node {wanted} -m pointillist generate …"
        )
    raise ValueError(
        f"torchrun started {count} processes, and --ulysses {ulysses} times --ring {ring} is {wanted}; make them equal"
    )


@contextmanager
def together(pipe: Any, ulysses: int, ring: int) -> Iterator[Job]:
    """Meet the other processes, split the pipeline over them, and decode in parts; nothing happens where there are
    none."""
    job = this_job()
    if ulysses * ring == 1:
        yield job
        return
    import torch.distributed as dist

    from pointillist.accel.parallel.decode import decoding_in_parts
    from pointillist.accel.parallel.start import join, parallelize, separate

    mine = not dist.is_initialized()
    join(pipe._execution_device)
    parallelize(pipe, ulysses, ring)
    try:
        with decoding_in_parts(pipe):
            yield job
    finally:
        separate(pipe)
    if mine:  # not where something went wrong: others may not be there any more
        dist.barrier()
        dist.destroy_process_group()


def device_of(wish: str | None) -> str | None:
    """The device of this process: each of a job on a machine with GPUs has its own."""
    import torch

    job = this_job()
    if job.processes == 1 or wish not in (None, "cuda") or not torch.cuda.is_available():
        return wish
    return f"cuda:{job.local_rank}"


def seed_of(wish: int | None) -> int:
    """The seed, which is drawn by the first process where none is wished."""
    import torch.distributed as dist

    seed = [secrets.randbelow(2**31) if wish is None else wish]
    if wish is None and dist.is_initialized():
        dist.broadcast_object_list(seed, src=0)
    return seed[0]
