"""What the kernels refuse: arguments that do not fit, with their actual values in the sentence.

Shapes, dtypes and devices are always checked. Values (bounds, columns, orders, numbers of blocks) are checked where
they can be read without waiting for a device, which is on the CPU; on a GPU wrong ones read foreign memory.
"""

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import Means


def check_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float | None = None,
    query_blocks: torch.Tensor | None = None,
    means: Means | None = None,
) -> None:
    """Raises TypeError for what is no tensor or layout, ValueError for what does not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if query_blocks is not None and not isinstance(query_blocks, torch.Tensor):
        raise TypeError(f"query_blocks is {describe(query_blocks)}; it must be an int64 tensor [n]")
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"the layout is a {type(layout).__name__}; it must be a BlockLayout, e.g. BlockLayout.from_mask"
        )
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, H, Sq, D], [B, H, Sk, D] "
            "and [B, H, Sk, D]"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must not be empty in any axis")
    if (
        q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        or len({q.dtype, k.dtype, v.dtype}) > 1
    ):
        raise ValueError(
            f"q ({q.dtype}), k ({k.dtype}) and v ({v.dtype}) must have one and the same dtype of float16, bfloat16, "
            "float32 and float64"
        )
    parts = _parts(layout)
    others: dict[str, torch.Tensor | None] = {"k": k, "v": v, "query_blocks": query_blocks}
    others |= {f"the layout's {name}": part for name, part in parts.items()}
    if means is not None:
        others |= {"means.keys": means.keys, "means.values": means.values}
        others |= {"means.log_counts": means.log_counts, "means.pairs": means.pairs}
    for name, other in others.items():
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} is on {other.device}; q is on {q.device}: move it there")
    if (layout.q_len, layout.k_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"the layout is for {layout.q_len} queries and {layout.k_len} keys; "
            f"q and k have {q.shape[2]} and {k.shape[2]}"
        )
    for name, part in parts.items():
        if name not in ("columns", "key_lengths") and any(
            n not in (1, size) for n, size in zip(part.shape, q.shape[:2], strict=False)
        ):
            raise ValueError(
                f"the layout's {name} is for batch and heads {tuple(part.shape[:2])}; q has {tuple(q.shape[:2])}"
            )
    if layout.key_lengths is not None and tuple(layout.key_lengths.shape) != (q.shape[0],):
        raise ValueError(
            f"the layout's key_lengths have shape {tuple(layout.key_lengths.shape)}; a batch of {q.shape[0]} needs "
            f"({q.shape[0]},)"
        )
    if scale is not None and not (_is_number(scale) and scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale!r}; it must be a finite number above 0")
    if query_blocks is not None:
        check_query_blocks(query_blocks, layout)
    if means is not None:
        _check_means(q, means, layout)
    check_layout(layout)


def check_layout(layout: BlockLayout) -> None:
    """Raises ValueError for dtypes that are wrong, and on the CPU for values that are."""
    for name, x in _parts(layout).items():
        allowed = (
            (torch.int32,)
            if name in ("columns", "indptr", "query_bounds", "key_bounds")
            else (torch.int32, torch.int64)
        )
        if x.dtype not in allowed:
            raise ValueError(f"the layout's {name} is {x.dtype}; it must be {' or '.join(map(str, allowed))}")
    if not values_are_known(layout.columns):
        return
    for name, bounds, length, largest in (
        ("query_bounds", layout.query_bounds, layout.q_len, layout.max_query_block),
        ("key_bounds", layout.key_bounds, layout.k_len, layout.max_key_block),
    ):
        sizes = bounds.diff(dim=-1)
        if (bounds[..., 0] != 0).any() or (bounds[..., -1] != length).any() or (sizes < 0).any():
            raise ValueError(
                f"the layout's {name} run from {bounds[..., 0].flatten().tolist()[:4]} to "
                f"{bounds[..., -1].flatten().tolist()[:4]} with steps from {int(sizes.min())} on; they must ascend "
                f"from 0 to {length}"
            )
        if int(sizes.max()) > largest:
            raise ValueError(
                f"the layout's {name} hold a block of {int(sizes.max())}, above the largest promised, {largest}"
            )
    pairs = int(layout.indptr.max())
    if pairs > layout.columns.numel():
        raise ValueError(f"the layout keeps {pairs} pairs but holds {layout.columns.numel()}; `pairs` was too small")
    kept = layout.columns[:pairs]
    if pairs and (int(kept.min()) < 0 or int(kept.max()) >= layout.key_blocks):
        raise ValueError(
            f"the layout's columns run from {int(kept.min())} to {int(kept.max())}; allowed are 0 to "
            f"{layout.key_blocks - 1}"
        )
    for name, order, length in (
        ("query_order", layout.query_order, layout.q_len), ("key_order", layout.key_order, layout.k_len),
    ):  # fmt: skip
        if order is not None and not _is_permutation(order, length):
            raise ValueError(f"the layout's {name} is no permutation of 0 to {length - 1} in every head")
    lengths = layout.key_lengths
    if lengths is not None and (int(lengths.min()) < 0 or int(lengths.max()) > layout.k_len):
        raise ValueError(f"the layout's key_lengths are {lengths.tolist()}; allowed are 0 to {layout.k_len}")


def check_query_blocks(query_blocks: torch.Tensor, layout: BlockLayout) -> None:
    """Raises ValueError unless they are int64 [n], each a block of the layout."""
    if query_blocks.dtype != torch.int64 or query_blocks.ndim != 1:
        raise ValueError(f"query_blocks is {describe(query_blocks)}; it must be an int64 tensor [n]")
    if len(query_blocks) and values_are_known(query_blocks):
        low, high = int(query_blocks.min()), int(query_blocks.max())
        if low < 0 or high >= layout.query_blocks:
            raise ValueError(f"query_blocks run from {low} to {high}; allowed are 0 to {layout.query_blocks - 1}")


def check_pairs(pairs: torch.Tensor, layout: BlockLayout, batch: int, heads: int) -> None:
    """Raises ValueError unless `pairs` is bool [B|1, H|1, nq, nk] on the layout's device."""
    wanted = (layout.query_blocks, layout.key_blocks)
    fits = isinstance(pairs, torch.Tensor) and pairs.dtype == torch.bool and pairs.ndim == 4
    if (
        not fits
        or pairs.shape[0] not in (1, batch)
        or pairs.shape[1] not in (1, heads)
        or tuple(pairs.shape[2:]) != wanted
    ):
        raise ValueError(
            f"pairs is {describe(pairs)}; it must be bool [{batch}|1, {heads}|1, {wanted[0]}, {wanted[1]}]"
        )
    if pairs.device != layout.device:
        raise ValueError(f"pairs is on {pairs.device}; the layout is on {layout.device}")


def values_are_known(x: torch.Tensor) -> bool:
    """Whether the values of `x` can be read without waiting for a device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def describe(x: Any) -> str:
    """A value for an error: dtype, shape and device of a tensor, else its type."""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"


def _parts(layout: BlockLayout) -> dict[str, torch.Tensor]:
    names = ("columns", "indptr", "query_bounds", "key_bounds", "query_order", "key_order", "key_lengths")
    return {name: getattr(layout, name) for name in names if getattr(layout, name) is not None}


def _is_permutation(order: torch.Tensor, length: int) -> bool:
    if order.shape[-1] != length or int(order.min()) < 0 or int(order.max()) >= length:
        return False
    return bool(torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order.long(), True).all())


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _check_means(q: torch.Tensor, means: Means, layout: BlockLayout) -> None:
    batch, heads, _, head_dim = q.shape
    number = means.keys.shape[2] if means.keys.ndim == 4 else -1
    fits = (
        tuple(means.keys.shape) == tuple(means.values.shape) == (batch, heads, number, head_dim)
        and means.keys.dtype == means.values.dtype == q.dtype
        and means.log_counts.shape[-1:] == (number,)
        and means.pairs.dtype == torch.bool
        and tuple(means.pairs.shape[2:]) == (layout.query_blocks, number)
        and all(
            len(x.shape) == ndim and x.shape[0] in (1, batch) and x.shape[1] in (1, heads)
            for x, ndim in ((means.log_counts, 3), (means.pairs, 4))
        )
    )
    if not fits:
        raise ValueError(
            f"the means are keys {describe(means.keys)}, values {describe(means.values)}, log_counts "
            f"{describe(means.log_counts)}, pairs {describe(means.pairs)}; q {describe(q)} with "
            f"{layout.query_blocks} query blocks needs [{batch}, {heads}, n, {head_dim}] twice, [B|1, H|1, n] and bool "
            f"[B|1, H|1, {layout.query_blocks}, n]"
        )
