"""Scores on a few channels: an option of patterns that multiply many queries and keys to choose (Double Sparsity).

Which channels matter is a property of a head, so they are found once in a generation and kept.
"""

import torch

from pointillist.accel.patterns.pattern import Call


def on_channels(call: Call, q: torch.Tensor, k: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` of the channels of q and k [B, H, n, D], those of the largest mean |q| · mean |k|; 0 is all."""
    if not 0 < count < q.shape[-1]:
        return q, k
    if "channels" not in call.memory:
        weight = q.float().abs().mean(2) * k.float().abs().mean(2)
        call.memory["channels"] = weight.topk(count, dim=-1).indices.sort(-1).values
    chosen = call.memory["channels"][:, :, None]
    return q.gather(-1, chosen.expand(-1, -1, q.shape[2], -1)), k.gather(-1, chosen.expand(-1, -1, k.shape[2], -1))
