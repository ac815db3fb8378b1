"""The public kernels: check the arguments once, choose a backend, and say which and why.

Every one of them is an opaque operator to `torch.compile`, which sees one graph whatever the layout.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch

from pointillist.kernels import reference
from pointillist.kernels.checks import check_call, check_pairs, describe
from pointillist.kernels.layout import BlockLayout, bounds_per_head, uniform_bounds
from pointillist.kernels.pooling import Means, dropped_of, in_order, means_of, restore_order, valid_places
from pointillist.kernels.quantization import KINDS as QUANTIZED
from pointillist.kernels.quantization import from_int8, quantize
from pointillist.kernels.triton import INSTALLED, interpreting

BACKENDS = ("reference", "cpu", "triton")
BREAK_EVEN = {
    ("reference", False): 1.0, ("reference", True): 1.0, ("cpu", False): 0.95, ("cpu", True): 0.85,
    ("triton", False): 0.9, ("triton", True): 0.85,
}  # fmt: skip
"""(backend, with a pooled tail) → the density from which on dense attention is faster. For `cpu` read off float32
figures of the compiled kernel at 0.5 and 1 (docs/kernels.md), choosing blocks taken into account; an estimate for
`triton`; `reference` is there to be exact."""


def available_backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Every backend → "" if it runs on `device`, else the reason why not."""
    kind = torch.device(device).type
    reasons = {"reference": "", "cpu": "" if kind == "cpu" else f"it computes on the CPU only, not on {kind}"}
    if not INSTALLED:
        reasons["triton"] = "the package triton is not installed"
    elif kind == "cpu":
        wanted = "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1), which is for tests"
        reasons["triton"] = "" if interpreting() else wanted
    elif kind == "cuda":
        reasons["triton"] = "" if torch.cuda.is_available() else "torch sees no CUDA device"
    else:
        reasons["triton"] = f"it computes on CUDA devices, not on {kind}"
    return reasons


def choose_backend(device: torch.device | str, wish: str = "auto") -> tuple[str, str]:
    """The backend to use on `device` and the reason, in words.

    Raises:
        ValueError: the wished backend is unknown or cannot run here.
    """
    _check_wish(wish)
    reasons = available_backends(device)
    if wish != "auto":
        if reasons[wish]:
            raise ValueError(f"backend {wish!r} cannot run here: {reasons[wish]}")
        return wish, "asked for" + (f"; {_how_on_cpu()}" if wish == "cpu" else "")
    kind = torch.device(device).type
    if kind == "cpu":
        return "cpu", f"the tensors are on the CPU; {_how_on_cpu()}"
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
    check_call(q, k, v, layout, scale, query_blocks)
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
    check_call(q, k, v, layout, scale, query_blocks, means)
    if means is None:
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
    some_k, some_v = pooled_k[:, :, :1], pooled_v[:, :, :1]  # of the one key block, which nobody sees
    check_call(q, some_k, some_v, nothing, scale, means=means)
    return _attention(q, some_k, some_v, nothing, scale, backend, means)


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
        out [B, H, Sq, D]. Costs S·F·D and one product of the pairs with all states, nq·nk·F·D; the states take
        4·F·D bytes for every block and head, twice.
    """
    check_call(q, k, v, layout)
    pairs = dropped_of(layout) if pairs is None else pairs
    check_pairs(pairs, layout, *q.shape[:2])
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
    check_call(q, k, k, layout, scale)
    if tuple(lse.shape) != tuple(q.shape[:3]) or lse.device != q.device or not lse.dtype.is_floating_point:
        raise ValueError(f"lse is {describe(lse)}; it must be floating {tuple(q.shape[:3])} on {q.device}")
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
    """For arguments that `check_call` has passed."""
    _check_wish(backend)
    if quantized not in QUANTIZED:
        raise ValueError(f"quantized is {quantized!r}; allowed are {', '.join(QUANTIZED)}")
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
    if query_blocks is not None and not len(query_blocks):  # nothing to do
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=_lse_dtype(q, name))
    if quantized == "none":
        return attend(q, k, v, layout, scale, means, query_blocks)
    rounded = quantize(q, k, layout, v if quantized == "int8_fp8" else None)
    if name == "triton":
        out, lse = attend(q, k, v, layout, scale, means, query_blocks, rounded)
    else:
        rounded_q = restore_order(from_int8(rounded.q, rounded.q_scales), query_order).to(q.dtype)
        rounded_k = restore_order(from_int8(rounded.k, rounded.k_scales), key_order).to(k.dtype)
        if rounded.v is not None and rounded.v_scales is not None:
            v = restore_order((rounded.v.float() * rounded.v_scales[:, :, None]), key_order).to(v.dtype)
        out, lse = attend(rounded_q, rounded_k, v, layout, scale, means, query_blocks)
    return out, lse + rounded.lse_shift(q, scale).to(lse.dtype)


@_attention_op.register_fake
def _(q, k, v, *rest):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_lse_dtype(q, choose_backend(q.device, rest[-2])[0]))


def _lse_dtype(q: torch.Tensor, backend: str) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 and backend == "reference" else torch.float32


@torch.compiler.assume_constant_result
def _how_on_cpu() -> str:
    from pointillist.kernels.cpu.block_sparse import how

    return how()


def _check_wish(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; allowed are auto, {', '.join(BACKENDS)}")


def _backend(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if name == "reference":
        return reference.attention
    return importlib.import_module(f"pointillist.kernels.{name}.block_sparse").attention
