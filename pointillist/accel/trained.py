"""What methods that are trained need beside q, k and v: their tensors, and what went into the attention module.

Pipelines load a checkpoint without the tensors that their classes do not know. A file with them, given to
`accelerate(weights=FILE)`, brings them back: its keys are the site and the tensor's name in it, for example
`blocks.3.attn1.proj_l.weight`, or `transformer_2.blocks.3.attn1.proj_l.weight` for a second transformer.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pointillist.accel.patterns.pattern import Call, video_of

Given = str | os.PathLike[str] | Mapping[str, torch.Tensor] | None
SHOWN = 3
"""So many wrong keys are listed in an error."""


def load_weights(given: Given) -> dict[str, torch.Tensor]:
    """Trained tensors by their keys, from a safetensors file or a mapping; none for None.

    Raises:
        ValueError: no such file, a file of another kind, or a mapping of something else than text to tensors.
    """
    if given is None:
        return {}
    if isinstance(given, str | os.PathLike):
        try:
            return load_file(os.fspath(given))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"cannot read weights from {os.fspath(given)}: {error}") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"weights is a {type(given).__name__}; it must be a safetensors file or a mapping of tensors")
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"weights has {key!r}: {type(value).__name__}; it must map keys to tensors")
    return dict(given)


def check_keys(given: Mapping[str, torch.Tensor], site_names: Iterable[str]) -> None:
    """Raises ValueError for keys that fit no site."""
    names = list(site_names)
    starts = tuple(start for name in names for start in _starts(name))
    strangers = [key for key in given if not key.startswith(starts)]
    if strangers:
        shown = ", ".join(strangers[:SHOWN]) + (", …" if len(strangers) > SHOWN else "")
        raise ValueError(
            f"weights has {len(strangers)} keys that fit no site: {shown}; a key is a site and a name, for example "
            f"{names[0]}.proj_l.weight"
        )


def weights_of(
    attention: torch.nn.Module, site_name: str, given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a site by their names: the module's own parameters, and over them the given ones.

    Given ones go to the module's device now. Where the module moves later, patterns move them in every call.
    """
    own = dict(attention.named_parameters())
    device = next((parameter.device for parameter in own.values()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    starts = _starts(site_name)
    placed = {
        key.removeprefix(start): tensor.to(device)
        for key, tensor in given.items()
        for start in starts
        if key.startswith(start)
    }
    return {**own, **placed}


def watch_hidden_states(sites: Mapping[torch.nn.Module, Any]) -> Callable[[], None]:
    """Let every site (by its attention module) know the module's input while the module runs. Returns the undo.

    In a compiled block the hooks part the graph, so `fullgraph=True` is refused by torch.compile.
    """

    @torch.compiler.disable
    def entered(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sites[module].hidden_states = args[0] if args else kwargs["hidden_states"]

    @torch.compiler.disable
    def left(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sites[module].hidden_states = None

    handles = []  # the same two functions for all, so that compiled blocks share their graphs
    for module in sites:
        handles.append(module.register_forward_pre_hook(entered, with_kwargs=True))
        handles.append(module.register_forward_hook(left, always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def trained(call: Call, method: str, names: tuple[str, ...], instead: str) -> tuple[torch.Tensor, ...] | None:
    """The site's tensors `names`; None, and a note of what runs `instead`, if any of them is not there."""
    missing = [name for name in names if name not in call.weights]
    if missing:
        call.notes[f"{method}: no trained weights ({', '.join(missing)}) at this site: {instead}"] += 1
        return None
    return tuple(call.weights[name].detach().to(call.device, non_blocking=True) for name in names)


def check_shape(name: str, tensor: torch.Tensor, *allowed: tuple[int | None, ...]) -> None:
    """Raises ValueError unless the shape of a trained tensor is one of `allowed`; None is any length."""
    for shape in allowed:
        if len(shape) == tensor.ndim and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
            return
    texts = (f"[{', '.join('any' if n is None else str(n) for n in shape)}]" for shape in allowed)
    raise ValueError(f"the trained tensor {name} is {list(tensor.shape)}; it must be {' or '.join(texts)}")


def added_to_video(call: Call, out: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """`out` [B, H, S, D] with `more` [B, H, N, D], float32 or wider, added to the video's tokens."""
    video = video_of(call.segments)
    rows = slice(video.start, video.stop)
    result = torch.empty_like(out).copy_(out)
    result[:, :, rows] = (out[:, :, rows] + more).to(out.dtype)
    return result


def _starts(site_name: str) -> tuple[str, str]:
    """What the keys of a site begin with: those of `transformer` may leave its name out."""
    bare = site_name.removeprefix("transformer.")
    return f"{bare}.", f"transformer.{bare}."
