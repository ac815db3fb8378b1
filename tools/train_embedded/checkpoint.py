"""Checkpoints of a training run: tensors in one safetensors file, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_checkpoint(path: Path, parts: dict[str, dict[str, torch.Tensor]], facts: dict[str, Any]) -> None:
    """Write `parts` (name → state dict of tensors) and `facts` (JSON values) to `path`, atomically."""
    flat = {
        f"{part}/{key}": value.contiguous().clone() for part, state in parts.items() for key, value in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(flat, temporary, metadata={"facts": json.dumps(facts)})
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """The inverse of `save_checkpoint`."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        for name in file.keys():
            part, key = name.split("/", 1)
            parts.setdefault(part, {})[key] = file.get_tensor(name)
    return parts, facts


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors, keyed by parameter index and name."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
