"""Bytes that are remembered from step to step: counted, predicted before they are kept, refused if they cannot fit."""

from collections.abc import Iterator
from typing import Any

import torch


class MemoryRefusedError(MemoryError):
    """What would be kept cannot fit: how much it is, how much there is, what to do."""


def held_bytes(*values: Any) -> int:
    """Of all tensors in nested containers; storage that several share counts once."""
    storages = {}
    for x in _tensors(values):
        storage = x.untyped_storage()
        storages[storage.data_ptr(), x.device] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def owned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where x is a part of something larger, which would be kept with it."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated on a device now; None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":") for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return None


def check_fits(what: str, needed: int, device: torch.device, ways: dict[str, int | None]) -> None:
    """Raises MemoryRefusedError if `needed` bytes do not fit on the device.

    Args:
        what: is kept, in words.
        ways: what to do in its place, and how many bytes that would need; None where none.
    """
    free = free_bytes(device)
    if free is None or needed <= free:
        return
    others = (way if count is None else f"{way} needs {size(count)}" for way, count in ways.items())
    raise MemoryRefusedError(
        f"{what}, which takes {size(needed)}, but {device} has {size(free)} free; {', '.join(others)}"
    )


def region_bytes(
    layers: tuple[str, ...],
    *,
    branches: int,
    batch: int,
    tokens: int,
    chosen: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    latents: int,
    sparse: bool = False,
    steps: int = 1,
) -> int:
    """What region sampling keeps of one transformer.

    Args:
        layers: how each of them keeps the other tokens' keys and values, one of `regions.policy.KEYS` or `none`.
        chosen: of the tokens, so many are computed.
        latents: how many numbers the clips' latents are.
        sparse: whether region steps follow the pairs of sparse ones; then each token's block is kept, by head.
        steps: keys and values of so many are kept.
    """
    width = heads * head_dim
    numbers = sum({"full": 2 * itemsize, "input": itemsize, "fp8": 2, "none": 0}[how] for how in layers)
    scales = 2 * 4 * heads * layers.count("fp8")
    blocks = 8 * heads * tokens * (len(layers) - layers.count("none")) if sparse else 0
    rotary = 2 * 4 * tokens * head_dim if "input" in layers else 0
    keys = steps * (numbers * tokens * width + scales)
    of_branch = batch * (keys + blocks) + rotary + itemsize * latents  # and the velocity
    shared = 2 * 4 * latents + batch * (3 * 4 * tokens + 8 * chosen)  # of the step before; importance, ages, choice
    return branches * of_branch + shared


def size(count: int) -> str:
    """In words."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def heads_of(transformer: Any) -> tuple[int, int] | None:
    """Number and width of the attention heads; None where the model's configuration does not tell them."""
    found = tuple(transformer.config.get(name) for name in ("num_attention_heads", "attention_head_dim"))
    return (found[0], found[1]) if all(isinstance(each, int) for each in found) else None


def branches_of(pipe: Any, branch: str) -> int:
    """How many guidance passes a step has, as far as the first one's name tells: `cond` is not alone with guidance."""
    guided = hasattr(pipe, "_guidance_scale") and bool(getattr(pipe, "do_classifier_free_guidance", False))
    return 2 if guided and branch in ("cond", "uncond") else 1
