"""The public kernels: check the arguments once, choose a backend, and say which and why.

Every one of them is an opaque operator to `torch.compile`, which sees one graph whatever the layout.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from pointillist.kernels import reference
from pointillist.kernels.layout import BlockLayout, bounds_per_head, uniform_bounds
from pointillist.kernels.pooling import Means, dropped_of, in_order, means_of, restore_order, valid_places
from pointillist.kernels.quantization import KINDS as QUANTIZED
from pointillist.kernels.quantization import from_int8, quantize

BACKENDS = ("reference", "cpu", "triton")
BREAK_EVEN = {"reference": 1.0, "cpu": 0.7, "triton": 0.9}
"""The density from which on dense attention is faster: measured for `cpu` (benchmarks/results/attention_cpu.json), for
`triton` an estimate. `reference` is there for its exactness."""


def available_backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Every backend → "" if it runs on `device`, else the reason why not."""
    kind = torch.device(device).type
    reasons = {"reference": "", "cpu": "" if kind == "cpu" else f"it computes on the CPU only, not on {kind}"}
    if importlib.util.find_spec("triton") is None:
        reasons["triton"] = "the package triton is not installed"
    else:
        from pointillist.kernels.triton import interpreting

        if kind == "cpu" and not interpreting():
            reasons["triton"] = "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1), which is for tests"
        else:
            reasons["triton"] = ""
    return reasons


def choose_backend(device: torch.device | str, wish: str = "auto") -> tuple[str, str]:
    """The backend to use on `device` and the reason, in words.

    Raises:
        ValueError: the wished backend is unknown or cannot run here.
    """
    if wish != "auto" and wish not in BACKENDS:
        raise ValueError(f"backend {wish!r} is unknown; allowed are auto, {', '.join(BACKENDS)}")
    reasons = available_backends(device)
    if wish != "auto":
        if reasons[wish]:
            raise ValueError(f"backend {wish!r} cannot run here: {reasons[wish]}")
        return wish, "asked for"
    kind = torch.device(device).type
    if kind == "cpu":
        return "cpu", "the tensors are on the CPU"
    if not reasons["triton"]:
        return "triton", f"the tensors are on {kind}"
    return "reference", f"no fast backend on {kind}: {reasons['triton']}"


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    *,
    query_blocks: torch.Tensor | None = None,
    quantized: str = "none",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the kept pairs of `layout`, forward only.

    Args:
        q: [B, H, Sq, D]; k, v: [B, H, Sk, D]. Any strides.
        scale: of the scores, above 0; D^-0.5 if None.
        return_lse: also return the log-sum-exp of every row, float32 [B, H, Sq], natural log.
        query_blocks: int64 [n], the only query blocks to compute; None is all. Rows of the others give 0 and −inf.
        quantized: `int8`, the product QKᵀ in INT8, or `int8_fp8`, the product with v in FP8 as well
            (`quantization.py`). For speed in Triton; elsewhere the same rounding and no speed.

    Returns:
        out [B, H, Sq, D], and lse if asked for. A row that sees nothing gives 0 and −inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or a backend that cannot run here.
    """
    out, lse = _attention(q, k, v, layout, scale, backend, None, query_blocks, quantized)
    return (out, lse) if return_lse else out


def attention_with_pooled_tail(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float | None = None,
    backend: str = "auto",
    *,
    means: Means | None = None,
    query_blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kept pairs exactly, every dropped key block by its mean (SVG-EAR; Sol-Attn), one softmax over both.

    `means` gives others than the block means, for example the levels of a pyramid (PSA). The other arguments, the
    result and the errors are those of `block_sparse_attention`.
    """
    if means is None:
        _check(q, k, v, layout, scale, query_blocks)
        if layout.key_lengths is None:  # valid lengths count tokens in their own order, so that order must stay
            k, v = in_order(k, layout.key_order), in_order(v, layout.key_order)
            layout = replace(layout, key_order=None)
        means = means_of(in_order(k, layout.key_order), in_order(v, layout.key_order), layout)
    return _attention(q, k, v, layout, scale, backend, means, query_blocks)[0]


def pooled_attention(
    q: torch.Tensor,
    pooled_k: torch.Tensor,
    pooled_v: torch.Tensor,
    log_counts: torch.Tensor,
    *,
    pairs: torch.Tensor,
    query_bounds: torch.Tensor,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over means of keys, `log_counts` [B|1, H|1, n] added to the logits.

    `pairs` bool [B|1, H|1, nq, n] says which query block (of `query_bounds`, int32 [nq+1] or [B|1, H|1, nq+1]) sees
    which mean; for a tail it is `dropped_of(layout)`. `q` is in place order. Returns out and lse as
    `block_sparse_attention` does.
    """
    bounds = bounds_per_head("query_bounds", query_bounds)
    means = Means(pooled_k, pooled_v, log_counts, pairs)
    nothing = BlockLayout(
        q_len=q.shape[2],
        k_len=1,
        query_bounds=bounds,
        key_bounds=uniform_bounds(1, 1, q.device)[None, None],
        indptr=bounds.new_zeros(1, 1, bounds.shape[-1]),
        columns=bounds.new_zeros(0),
        max_query_block=q.shape[2],
        max_key_block=1,
    )
    return _attention(q, pooled_k[:, :, :1], pooled_v[:, :, :1], nothing, scale, backend, means)


merge_attention = reference.merge_attention


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: Callable[[torch.Tensor], torch.Tensor],
    layout: BlockLayout,
    *,
    pairs: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Linear attention over block pairs: Σ φ(q)·φ(k) v / Σ φ(q)·φ(k) (SLA; LinFusion). A sum of 0 gives 0.

    Args:
        feature_map: φ, from [B, H, S, D] to [B, H, S, F], elementwise or along the last axis; 0 or more.
        layout: its bounds, orders and valid lengths count; its kept pairs only through `pairs`.
        pairs: bool [B|1, H|1, nq, nk]; None is what `layout` drops.

    Returns:
        out [B, H, Sq, D]. Costs S·F·D, whatever the pairs.
    """
    _check(q, k, v, layout, None, None)
    pairs = dropped_of(layout) if pairs is None else pairs
    if choose_backend(q.device, backend)[0] == "reference":
        return reference.linear_attention(q, k, v, feature_map, layout, pairs)
    from pointillist.kernels.linear import linear_attention as by_states

    return by_states(q, k, v, feature_map, layout, pairs, backend)


def block_masses(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    layout: BlockLayout,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """How much softmax weight the queries of a block give to each key block on average: float32 [B, H, nq, nk].

    `lse` [B, H, Sq] is that of dense attention (`block_sparse_attention` with everything kept returns it). One more
    pass over QKᵀ; no matrix of scores is kept (AdaSpa, the online search).
    """
    _check(q, k, k, layout, scale, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if choose_backend(q.device, backend)[0] != "triton":
        return reference.block_masses(q, k, lse, layout, scale).float()
    from pointillist.kernels.triton.block_masses import block_masses as on_device

    q, k = in_order(q, layout.query_order), in_order(k, layout.key_order)
    lse = in_order(lse[..., None], layout.query_order)[..., 0]
    valid = valid_places(layout.k_len, layout.key_lengths, layout.key_order, q.device)
    return on_device(q, k, lse.float(), layout.query_bounds, layout.key_bounds, valid, scale)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float | None,
    backend: str,
    means: Means | None,
    query_blocks: torch.Tensor | None = None,
    quantized: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v, layout, scale, query_blocks)
    if quantized not in QUANTIZED:
        raise ValueError(f"quantized is {quantized!r}; allowed are {', '.join(QUANTIZED)}")
    if means is not None:
        _check_means(q, means, layout)
    return torch.ops.pointillist.attention(
        q, k, v, layout.query_bounds, layout.key_bounds, layout.indptr, layout.columns, layout.max_query_block,
        layout.max_key_block, layout.uniform, layout.query_order, layout.key_order, layout.key_lengths,
        *(None,) * 4 if means is None else (means.keys, means.values, means.log_counts, means.pairs),
        query_blocks, q.shape[-1] ** -0.5 if scale is None else float(scale), backend, quantized,
    )  # fmt: skip


@torch.library.custom_op("pointillist::attention", mutates_args=())
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    max_query_block: int,
    max_key_block: int,
    uniform: bool,
    query_order: torch.Tensor | None,
    key_order: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    mean_k: torch.Tensor | None,
    mean_v: torch.Tensor | None,
    log_counts: torch.Tensor | None,
    pairs: torch.Tensor | None,
    query_blocks: torch.Tensor | None,
    scale: float,
    backend: str,
    quantized: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.attention` on the chosen backend, a layout and means given by their parts."""
    layout = BlockLayout(
        q.shape[2], k.shape[2], query_bounds, key_bounds, indptr, columns, max_query_block, max_key_block, uniform,
        query_order, key_order, key_lengths,
    )  # fmt: skip
    means = None
    if mean_k is not None:
        assert mean_v is not None and log_counts is not None and pairs is not None
        means = Means(mean_k, mean_v, log_counts, pairs)
    name, _ = choose_backend(q.device, backend)
    attend = _backend(name)
    if quantized == "none":
        return attend(q, k, v, layout, scale, means, query_blocks)
    rounded = quantize(q, k, layout, v if quantized == "int8_fp8" else None)
    if name == "triton":
        out, lse = attend(q, k, v, layout, scale, means, query_blocks, rounded)
    else:
        rounded_q = restore_order(from_int8(rounded.q, rounded.q_scales), query_order).to(q.dtype)
        rounded_k = restore_order(from_int8(rounded.k, rounded.k_scales), key_order).to(k.dtype)
        if rounded.v is not None:
            v = restore_order((rounded.v.float() * rounded.v_scales[:, :, None]), key_order).to(v.dtype)
        out, lse = attend(rounded_q, rounded_k, v, layout, scale, means, query_blocks)
    return out, lse + rounded.lse_shift(q, scale).to(lse.dtype)


@_attention_op.register_fake
def _(q, k, v, *rest):
    wide = q.dtype == torch.float64 and choose_backend(q.device, rest[-2])[0] == "reference"
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float64 if wide else torch.float32)


def _backend(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if name == "reference":
        return reference.attention
    return importlib.import_module(f"pointillist.kernels.{name}.block_sparse").attention


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float | None,
    query_blocks: torch.Tensor | None,
) -> None:
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, H, Sq, D], [B, H, Sk, D] "
            "and [B, H, Sk, D]"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must not be empty in any axis")
    if not q.dtype.is_floating_point or len({q.dtype, k.dtype, v.dtype}) > 1:
        raise ValueError(f"q ({q.dtype}), k ({k.dtype}) and v ({v.dtype}) must have one and the same floating dtype")
    if len({q.device, k.device, v.device, layout.device}) > 1:
        raise ValueError(
            f"q ({q.device}), k ({k.device}), v ({v.device}) and the layout ({layout.device}) must be on one device"
        )
    if (layout.q_len, layout.k_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"the layout is for {layout.q_len} queries and {layout.k_len} keys; "
            f"q and k have {q.shape[2]} and {k.shape[2]}"
        )
    parts = dict(
        indptr=layout.indptr, query_bounds=layout.query_bounds, key_bounds=layout.key_bounds,
        query_order=layout.query_order, key_order=layout.key_order,
    )  # fmt: skip
    for name, part in parts.items():
        if part is not None and any(n not in (1, size) for n, size in zip(part.shape, q.shape[:2], strict=False)):
            raise ValueError(
                f"the layout's {name} is for batch and heads {tuple(part.shape[:2])}; q has {tuple(q.shape[:2])}"
            )
    if layout.key_lengths is not None and tuple(layout.key_lengths.shape) != (q.shape[0],):
        raise ValueError(
            f"the layout's key_lengths have shape {tuple(layout.key_lengths.shape)}; "
            f"a batch of {q.shape[0]} needs ({q.shape[0]},)"
        )
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; it must be a finite number above 0")
    if query_blocks is not None and (
        query_blocks.dtype != torch.int64 or query_blocks.ndim != 1 or not len(query_blocks)
    ):
        raise ValueError(
            f"query_blocks is {query_blocks.dtype} {tuple(query_blocks.shape)}; it must be int64 [n] with n above 0, "
            f"each below {layout.query_blocks}"
        )


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
            f"the means are keys {means.keys.dtype} {tuple(means.keys.shape)}, values {means.values.dtype} "
            f"{tuple(means.values.shape)}, log_counts {tuple(means.log_counts.shape)}, pairs {means.pairs.dtype} "
            f"{tuple(means.pairs.shape)}; q {q.dtype} {tuple(q.shape)} with {layout.query_blocks} query blocks needs "
            f"[{batch}, {heads}, n, {head_dim}] twice, [B|1, H|1, n] and bool [B|1, H|1, {layout.query_blocks}, n]"
        )
