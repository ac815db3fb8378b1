"""The one file that touches private names of Diffusers' context parallelism.

Tensors in attention are [B, S, H, D]. Of `ulysses · ring` processes, each holds a part of the tokens outside of
attention. Ulysses exchanges heads for tokens: all tokens of some heads. A ring keeps the queries and shows them the
keys of one process after the other.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import (
    EquipartitionSharder,
    PartitionAnythingSharder,
)
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import (
    SeqAllToAllDim,
    TemplatedRingAnythingAttention,
    TemplatedRingAttention,
    _templated_context_parallel_attention,
)
from torch.distributed.distributed_c10d import _set_pg_timeout

from pointillist.accel.parallel.errors import ParallelError
from pointillist.accel.parallel.tokens import part_sizes

Config = Any
"""A `ContextParallelConfig`, whose degrees are numbers once it is made."""
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
AttendChunk = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(number of the rank whose keys they are, q, k, v) → output [B, S, H, D] and float32 log-sum-exp [B, S, H]."""


def make_config(ulysses: int, ring: int) -> Config:
    """Of `ulysses · ring` processes, which are running (see `start`)."""
    return ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring)


def set_config(transformer: Any, config: Config, device: torch.device, answer: timedelta) -> None:
    """What `enable_parallelism` does first: the mesh, noted on the model. That method divides by the number of GPUs.
    Exchanges that take longer than `answer` fail."""
    mesh = config.mesh or dist.device_mesh.init_device_mesh(
        device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names
    )
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    transformer._parallel_config = parallel
    for part in ("all", "ulysses", "ring"):
        _set_pg_timeout(answer, process_group(config, part))


def config_of(transformer: Any) -> Config | None:
    """The model's, if it is split over processes; raises ValueError for another kind of parallelism."""
    parallel = getattr(transformer, "_parallel_config", None)
    if parallel is None:
        return None
    if parallel.context_parallel_config is None:
        raise ValueError("it is split over processes by its weights (tensor parallelism), which is not supported")
    return parallel.context_parallel_config


def clear_config(transformer: Any) -> None:
    """The inverse of `set_config`."""
    transformer._parallel_config = None


def take_over(transformer: Any) -> Callable[[], None]:
    """Take away the splitting that `enable_parallelism` put into the model, if it did: ours is elsewhere. Returns what
    puts it back."""
    found: list[tuple[Any, str, Any]] = []
    configs: list[tuple[Any, Any]] = []
    for module in transformer.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        for name in [] if registry is None else [name for name in registry.hooks if name.startswith("cp_")]:
            found.append((registry, name, registry.hooks[name]))
            registry.remove_hook(name, recurse=False)
        processor: Any = getattr(module, "processor", None)
        if getattr(processor, "_parallel_config", None) is not None:
            configs.append((processor, processor._parallel_config))
            processor._parallel_config = None

    def undo() -> None:
        for registry, name, hook in found:
            registry.register_hook(hook, name)
        for processor, config in configs:
            processor._parallel_config = config

    return undo


def degrees(config: Config) -> tuple[int, int]:
    """Of Ulysses and of the ring."""
    return config.ulysses_degree, config.ring_degree


def places(config: Config) -> tuple[int, int]:
    """This process's, in its Ulysses group and in its ring."""
    return config._ulysses_local_rank, config._ring_local_rank


def process_group(config: Config, part: str = "all") -> Any:
    """Of all processes that share a video, or of this one's `ulysses` or `ring` part."""
    mesh = {"all": config._flattened_mesh, "ulysses": config._ulysses_mesh, "ring": config._ring_mesh}[part]
    return mesh.get_group()


def allow_uneven(config: Config, uneven: bool) -> None:
    """Let the next exchanges be of lengths or heads that do not divide, which costs talk about sizes."""
    config.ulysses_anything = uneven and config.ring_degree == 1
    config.ring_anything = uneven and config.ulysses_degree == 1


def shard(x: torch.Tensor, dim: int, config: Config) -> torch.Tensor:
    """This process's part of x."""
    return PartitionAnythingSharder.shard_anything(x, dim, config._flattened_mesh)


def unshard(x: torch.Tensor, dim: int, config: Config, length: int) -> torch.Tensor:
    """All parts in their order, `length` entries, from every process's. Gloo gathers only equal parts, so those of an
    uneven split are filled up on the way."""
    sizes = part_sizes(length, config._flattened_mesh.size())
    missing = sizes[0] - x.shape[dim]
    if missing:
        x = torch.cat([x, x.narrow(dim, 0, missing)], dim)
    with telling():
        whole = EquipartitionSharder.unshard(x, dim, config._flattened_mesh)
    if sizes[0] == sizes[-1]:
        return whole
    parts = whole.split(sizes[0], dim)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)


def with_all_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Config, attend: Attend) -> torch.Tensor:
    """Ulysses: `attend` sees all tokens (the parts of the processes in a row) of this process's heads."""

    def forward(ctx: Any, query: Any, key: Any, value: Any, *others: Any, **named: Any) -> torch.Tensor:
        return attend(query, key, value)

    with telling():
        return _templated_context_parallel_attention(
            q,
            k,
            v,
            forward_op=forward,
            backward_op=None,
            _parallel_config=ParallelConfig(context_parallel_config=config),
        )


def exchange(x: torch.Tensor, config: Config, back: bool = False) -> torch.Tensor:
    """Ulysses within a ring: tokens of the Ulysses group for a part of the heads; `back` is the inverse."""
    with telling():
        return SeqAllToAllDim.apply(process_group(config, "ulysses"), x, *((1, 2) if back else (2, 1)))


def around_the_ring(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Config, attend: AttendChunk
) -> torch.Tensor:
    """Ring: `attend` sees this process's queries and the keys of one rank after the other, its own first; outputs are
    merged by their log-sum-exps."""
    rank, count = config._ring_local_rank, config.ring_degree
    chunks = itertools.count()

    def forward(ctx: Any, query: Any, key: Any, value: Any, *others: Any, **named: Any) -> Any:
        return attend((rank + next(chunks)) % count, query, key, value)

    kind = TemplatedRingAnythingAttention if config.ring_anything else TemplatedRingAttention
    with telling():
        return kind.apply(
            q, k, v, None, 0.0, False, None, False, False, forward, None, ParallelConfig(context_parallel_config=config)
        )


@contextmanager
def telling() -> Iterator[None]:
    """What breaks in an exchange is told as what it is: another process has ended, or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ParallelError) or not _is_of_the_network(error):
            raise
        first = str(error).strip().partition("\n")[0]
        raise ParallelError(
            f"another process of this job has ended or does not answer, so rank {dist.get_rank()} stops too; "
            f"its own message says why ({first:.200})"
        ) from error


def _is_of_the_network(error: RuntimeError) -> bool:
    words = ("connection", "timed out", "timeout", "broken pipe", "communicator was aborted")
    return isinstance(error, dist.DistNetworkError) or any(word in str(error).lower() for word in words)
