"""Scores on a few channels: an option of patterns that rank by products of queries and keys (Double Sparsity).

Which channels matter is a property of a head, so they are calibrated once in a generation and kept.
"""

import torch

from pointillist.accel.patterns.pattern import Call


def on_channels(call: Call, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The video's q and k [B, H, N, D], or only `count` of their channels [B, H, N, count]; 0 is all.

    Scores over fewer channels are smaller in size only where the dropped ones would have added: no rescaling.
    """
    q, k = call.video_q, call.video_k
    if not 0 < count < q.shape[-1]:
        return q, k
    if "channels" not in call.memory:
        weight = q.float().abs().mean(2) * k.float().abs().mean(2)
        call.memory["channels"] = weight.topk(count, dim=-1).indices.sort(-1).values
    chosen = call.memory["channels"][:, :, None].expand(-1, -1, q.shape[2], -1)
    return q.gather(-1, chosen), k.gather(-1, chosen)
