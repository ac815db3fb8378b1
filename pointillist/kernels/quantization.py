"""Queries and keys in INT8 and values in FP8, as SageAttention 2 has them (Zhang et al. 2024, section 3).

Keys are smoothed first: their mean over the sequence is taken off, which softmax does not notice (every score of a
row moves by the same amount) and which removes the outlier channels that make INT8 inexact. Then every group of
64 places has one scale, its largest magnitude over 127. Values have one scale for each channel.

INT4 is not here: Triton's products take nothing narrower than 8 bits but for FP4 with block scales, on sm_100 only.
"""

from dataclasses import dataclass

import torch

from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import in_order, valid_places

GROUP = 64
"""Places that share a scale."""
KINDS = ("none", "int8", "int8_fp8")
"""What may be quantised: nothing; queries and keys; values too."""
FP8_MAX = 448.0
"""The largest number of float8_e4m3fn."""


@dataclass(frozen=True)
class Quantized:
    """INT8 q and k in the place order of a layout; a value is its integer times the scale of its group."""

    q: torch.Tensor
    """int8 [B, H, Sq, D]; k [B, H, Sk, D] likewise."""
    k: torch.Tensor
    q_scales: torch.Tensor
    """float32 [B, H, ⌈Sq/64⌉]; `k_scales` [B, H, ⌈Sk/64⌉] likewise."""
    k_scales: torch.Tensor
    k_mean: torch.Tensor
    """float32 [B, H, 1, D]: what was taken off every key."""
    v: torch.Tensor | None = None
    """float8_e4m3fn [B, H, Sk, D] in place order, and float32 [B, H, D]: what each channel is multiplied by."""
    v_scales: torch.Tensor | None = None

    def lse_shift(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        """What smoothing took off the scores of the queries q [B, H, Sq, D], to be added to their lse: [B, H, Sq]."""
        return (q.float() @ self.k_mean.transpose(-1, -2))[..., 0] * scale


def quantize(q: torch.Tensor, k: torch.Tensor, layout: BlockLayout, v: torch.Tensor | None = None) -> Quantized:
    """q and k (and v, if given), in the tokens' own order, rounded and in place order. Forbidden keys count nowhere."""
    k = in_order(k, layout.key_order)
    valid = valid_places(layout.k_len, layout.key_lengths, layout.key_order, k.device)
    if valid is None:
        mean = k.mean(2, keepdim=True, dtype=torch.float32)
    else:
        k = k.masked_fill(~valid[..., None], 0)
        mean = k.sum(2, keepdim=True, dtype=torch.float32) / valid.sum(-1).clamp(min=1)[..., None, None]
    smooth = k.float() - mean
    if valid is not None:
        smooth = smooth.masked_fill(~valid[..., None], 0)
    (q8, q_scales), (k8, k_scales) = to_int8(in_order(q, layout.query_order).float()), to_int8(smooth)
    if v is None:
        return Quantized(q8, k8, q_scales, k_scales, mean)
    v = in_order(v, layout.key_order).float()
    if valid is not None:
        v = v.masked_fill(~valid[..., None], 0)
    v_scales = v.abs().amax(2).clamp(min=1e-12) / FP8_MAX
    return Quantized(q8, k8, q_scales, k_scales, mean, (v / v_scales[:, :, None]).to(torch.float8_e4m3fn), v_scales)


def to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, H, S, D] float32 as int8 and the scales of its groups, float32 [B, H, ⌈S/64⌉]."""
    length = x.shape[2]
    groups = torch.nn.functional.pad(x, (0, 0, 0, -length % GROUP)).unflatten(2, (-1, GROUP))
    scales = groups.abs().amax(dim=(-1, -2)).clamp(min=1e-12) / 127
    rounded = (groups / scales[..., None, None]).round_().to(torch.int8)
    return rounded.flatten(2, 3)[:, :, :length].contiguous(), scales


def from_int8(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_int8`, up to rounding: float32."""
    return x.float() * scales.repeat_interleave(GROUP, dim=-1)[..., : x.shape[2], None]
