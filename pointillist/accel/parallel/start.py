"""From a process that torchrun started to one that shares a pipeline with the others."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pointillist.accel.parallel import engine
from pointillist.accel.parallel.balance import head_counts
from pointillist.accel.parallel.seam import joint_of

MEET = timedelta(minutes=30)
"""So long a process waits for the others to start and to load their models."""
ANSWER = timedelta(seconds=120)
"""So long an exchange between processes may take after that before all of them stop."""


def join(device: torch.device) -> None:
    """Meet the other processes of the job. Exchanges on GPUs go through NCCL, sizes and agreements through gloo."""
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with engine.telling():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=MEET)


def parallelize(pipe: Any, ulysses: int = 1, ring: int = 1) -> None:
    """Split the transformers of `pipe` over `ulysses · ring` processes: call `accelerate` after it, on all of them.

    The same as Diffusers' `transformer.enable_parallelism(config=ContextParallelConfig(…))`, for models that lack a
    plan for it too, and on CPUs. Each process must load the same pipeline and call it with the same arguments.

    Raises:
        ValueError: degrees that do not fit the job or the model, with those that do.
    """
    count = dist.get_world_size() if dist.is_initialized() else 0
    if ulysses < 1 or ring < 1 or ulysses * ring < 2:
        raise ValueError(f"ulysses={ulysses} and ring={ring} split nothing; their product is the number of processes")
    if ulysses * ring != count:
        raise ValueError(
            f"ulysses={ulysses} times ring={ring} is {ulysses * ring}, and this job has {count or 1} processes; start "
            f"as many: torchrun --nproc-per-node {ulysses * ring} -m pointillist generate …"
        )
    transformers = _transformers(pipe)
    for transformer in transformers:
        if joint_of(transformer) is None:
            raise ValueError(f"a {type(transformer).__name__} cannot be split over processes: it is not known how")
        head_counts(int(transformer.config.num_attention_heads), ulysses)
    device = pipe._execution_device
    with engine.telling():
        dist.barrier()
        for transformer in transformers:
            engine.set_config(transformer, engine.make_config(ulysses, ring), device, ANSWER)


def separate(pipe: Any) -> None:
    """The inverse of `parallelize`, once nothing is accelerated any more."""
    for transformer in _transformers(pipe):
        engine.clear_config(transformer)


def _transformers(pipe: Any) -> list[Any]:
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [each for each in found if each is not None]
