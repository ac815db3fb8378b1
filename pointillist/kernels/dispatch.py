"""The public kernels: check the arguments once, choose a backend, and say which and why."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch

from pointillist.kernels import reference
from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import dropped_of, in_order, pool_blocks

BACKENDS = ("reference", "cpu", "triton")


def available_backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Every backend → "" if it runs on `device`, else the reason why not."""
    kind = torch.device(device).type
    reasons = {"reference": "", "cpu": "" if kind == "cpu" else f"it computes on the CPU only, not on {kind}"}
    if importlib.util.find_spec("triton") is None:
        reasons["triton"] = "the package triton is not installed"
    else:
        from pointillist.kernels.triton.block_sparse import interpreting

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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the kept pairs of `layout`, forward only.

    Args:
        q: [B, H, Sq, D]; k, v: [B, H, Sk, D]. Any strides.
        scale: of the scores; D^-0.5 if None.
        return_lse: also return the log-sum-exp of every row, float32 [B, H, Sq], natural log.

    Returns:
        out [B, H, Sq, D], and lse if asked for. A row that sees nothing gives 0 and −inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or a backend that cannot run here.
    """
    _check(q, k, v, layout)
    name, _ = choose_backend(q.device, backend)
    out, lse = _backend(name)(q, k, v, layout, q.shape[-1] ** -0.5 if scale is None else scale)
    return (out, lse) if return_lse else out


def pooled_attention(
    q: torch.Tensor,
    pooled_k: torch.Tensor,
    pooled_v: torch.Tensor,
    log_counts: torch.Tensor,
    *,
    pairs: torch.Tensor,
    query_bounds: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over block means of the keys, `log_counts` [B|1, H|1, n] added to the logits.

    `pairs` bool [B|1, H|1, nq, n] says which query block (of `query_bounds`, int32 [nq+1]) sees which mean;
    for a tail it is `dropped_of(layout)`. `q` is in block order. Plain torch on every device, a slice of the queries
    at a time.
    """
    return reference.pooled_attention(
        q,
        pooled_k,
        pooled_v,
        log_counts,
        pairs,
        query_bounds,
        q.shape[-1] ** -0.5 if scale is None else scale,
    )


merge_attention = reference.merge_attention


def attention_with_pooled_tail(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The kept pairs exactly, every dropped key block by its mean (SVG-EAR; Sol-Attn), one softmax over both.

    Arguments, result and errors are those of `block_sparse_attention`.
    """
    _check(q, k, v, layout)
    name, _ = choose_backend(q.device, backend)
    if name == "cpu":
        from pointillist.kernels.cpu import block_sparse as cpu

        return cpu.attention_with_pooled_tail(q, k, v, layout, q.shape[-1] ** -0.5 if scale is None else scale)
    places, q = layout.query_order, in_order(q, layout.query_order)
    layout = replace(layout, query_order=None)
    if layout.key_lengths is None:  # valid lengths count tokens in their own order
        k, v = in_order(k, layout.key_order), in_order(v, layout.key_order)
        layout = replace(layout, key_order=None)
    out, lse = block_sparse_attention(q, k, v, layout, scale, return_lse=True, backend=name)
    (pooled_k, counts), (pooled_v, _) = (
        pool_blocks(in_order(x, layout.key_order), layout.key_bounds, layout.key_lengths, layout.key_order)
        for x in (k, v)
    )
    tail, tail_lse = pooled_attention(
        q, pooled_k, pooled_v, counts.log(), pairs=dropped_of(layout), query_bounds=layout.query_bounds, scale=scale
    )
    out = merge_attention(out, lse, tail, tail_lse.to(lse.dtype))[0]
    return out if places is None else in_order(out, places.argsort(-1))


def _backend(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if name == "reference":
        return reference.block_sparse_attention
    return importlib.import_module(f"pointillist.kernels.{name}.block_sparse").block_sparse_attention


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> None:
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, H, Sq, D], [B, H, Sk, D] "
            "and [B, H, Sk, D]"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device, layout.device}) > 1:
        raise ValueError(
            f"q ({q.dtype}, {q.device}), k ({k.dtype}, {k.device}), v ({v.dtype}, {v.device}) and the layout "
            f"({layout.device}) must agree in dtype and device"
        )
    if (layout.q_len, layout.k_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"the layout is for {layout.q_len} queries and {layout.k_len} keys; "
            f"q and k have {q.shape[2]} and {k.shape[2]}"
        )
    for axis, size in enumerate(q.shape[:2]):
        if layout.indptr.shape[axis] not in (1, size):
            raise ValueError(
                f"the layout is for batch and heads {tuple(layout.indptr.shape[:2])}; q has {tuple(q.shape[:2])}"
            )
