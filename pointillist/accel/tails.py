"""Tails: what stands in for the pairs that a layout drops.

    none       nothing: the softmax is over the kept pairs alone
    pooled     the mean of every dropped key block, in one softmax with the kept pairs (SVG-EAR; Sol-Attn)
    rectified  a query block's share of mass on dropped blocks is estimated from block means; what was kept is scaled
               by the rest, and the mean values of dropped blocks are added (Rectified SpaAttn)
    rescaled   the share of mass that the pattern kept at the last dense step scales the output, and what that leaves
               of the step's output is added (Re-ttention)

Whatever the tail, a plan's `residual` adds what was still lost at the last dense step.
"""

import torch

from pointillist.accel.layouts import Laid, sub_call
from pointillist.accel.patterns.pattern import Call
from pointillist.kernels import (
    Means,
    attention_with_pooled_tail,
    block_sparse_attention,
    dropped_of,
    means_of,
    merge_attention,
    pooled_attention,
)
from pointillist.kernels.layout import block_of_place
from pointillist.kernels.pooling import in_order, pool_blocks, restore_order


def attend(call: Call, laid: Laid, tail: str, quantized: str = "none") -> torch.Tensor:
    """Attention of all heads of a site over `laid`, with a tail: [B, H, S, D].

    What `remember_loss` has put into the call's memory is added, with a weight that falls from 1 at the dense step to 0
    behind the last one: what a step loses resembles the loss of the steps before it.
    """
    return with_loss(call, _attend(call, laid, tail, quantized))


def with_loss(call: Call, out: torch.Tensor) -> torch.Tensor:
    """The output [B, H, S, D] and what was lost at the last dense step, if that was remembered."""
    if "lost output" not in call.memory:
        return out
    weight = (call.steps - call.step) / (call.steps - call.memory["lost at"])
    return torch.add(out, call.memory["lost output"], alpha=weight)


def remember_loss(
    call: Call, laid: Laid, out: torch.Tensor, tail: str, quantized: str = "none", sparse: torch.Tensor | None = None
) -> None:
    """Keep what `attend` loses of the output `out` [B, H, S, D] of a dense step: as much memory as q. `sparse` is what
    it gives, if that is known."""
    lost = out - (_attend(call, laid, tail, quantized) if sparse is None else sparse)
    call.memory["lost output"] = lost.masked_fill(~_has_tail(laid, call)[..., None], 0)
    call.memory["lost at"] = call.step


def remember_kept_mass(call: Call, laid: Laid, out: torch.Tensor) -> None:
    """What the tail `rescaled` needs of a dense step whose output was `out` [B, H, S, D]."""
    sparse, lse = block_sparse_attention(
        call.q, call.k, call.v, laid.layout, call.scale, return_lse=True, backend=call.backend
    )
    has_tail = _has_tail(laid, call)
    kept = (lse - call.lse).exp().clamp(max=1).masked_fill(~has_tail, 1)[..., None]
    call.memory["kept mass"] = kept
    call.memory["rest"] = (out - kept.to(out.dtype) * sparse).masked_fill(~has_tail[..., None], 0)


def attend_blocks(call: Call, laid: Laid, tail: str, query_blocks: torch.Tensor) -> torch.Tensor:
    """`attend` for a few query blocks of `laid` (int64 [n]) and with nothing remembered: rows of the others mean
    nothing. Blocks alone are what is computed with the tails `none` and `pooled`; the others take all of it."""
    return _attend(call, laid, tail, query_blocks=query_blocks if tail in ("none", "pooled") else None)


def _attend(
    call: Call, laid: Laid, tail: str, quantized: str = "none", query_blocks: torch.Tensor | None = None
) -> torch.Tensor:
    if tail == "pooled":
        return _with_means(call, laid, quantized, query_blocks)
    sparse = block_sparse_attention(
        call.q, call.k, call.v, laid.layout, call.scale, backend=call.backend, quantized=quantized,
        query_blocks=query_blocks,
    )  # fmt: skip
    assert isinstance(sparse, torch.Tensor)
    if tail == "rectified":
        return _rectified(call, laid, sparse)
    if tail == "rescaled":
        return _rescaled(call, sparse)
    return sparse


def _with_means(call: Call, laid: Laid, quantized: str, query_blocks: torch.Tensor | None) -> torch.Tensor:
    """The kept pairs and the means of the others in one softmax."""
    q, k, v, layout = call.q, call.k, call.v, laid.layout
    if quantized == "none":
        means = _own_means(call, laid)
        return attention_with_pooled_tail(
            q, k, v, layout, call.scale, backend=call.backend, means=means, query_blocks=query_blocks
        )
    means = _means(call, laid)  # the product with means stays in the tensors' own precision, so it is a pass of its own
    out, lse = block_sparse_attention(
        q, k, v, layout, call.scale, return_lse=True, backend=call.backend, quantized=quantized
    )
    tail, tail_lse = pooled_attention(
        in_order(q, layout.query_order), means.keys, means.values, means.log_counts, pairs=means.pairs,
        query_bounds=layout.query_bounds, scale=call.scale, backend=call.backend,
    )  # fmt: skip
    tail_lse = restore_order(tail_lse[..., None], layout.query_order)[..., 0]
    return merge_attention(out, lse, restore_order(tail, layout.query_order), tail_lse)[0]


def _own_means(call: Call, laid: Laid) -> Means | None:
    """None if all heads have the usual tail, block means."""
    plain = all(selection.tail and selection.means is None for _, selection in laid.parts)
    return None if plain else _means(call, laid)


def _means(call: Call, laid: Laid) -> Means:
    """Block means for the heads that have no tail of their own, nothing for those that have none at all."""
    layout, (batch, heads) = laid.layout, call.q.shape[:2]
    usual = means_of(in_order(call.k, layout.key_order), in_order(call.v, layout.key_order), layout)
    own = [
        (group, selection, selection.means(sub_call(group, call)))
        for group, selection in laid.parts
        if selection.means is not None
    ]
    count = max(usual.keys.shape[2], *(means.keys.shape[2] for *_, means in own)) if own else usual.keys.shape[2]
    more = count - usual.keys.shape[2]
    pairs = usual.pairs.expand(batch, heads, -1, -1) & _has_tail(laid, call)[:, :, None]
    keys, values = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (usual.keys, usual.values))
    log_counts = torch.nn.functional.pad(usual.log_counts.expand(batch, heads, -1), (0, more), value=float("-inf"))
    pairs = torch.nn.functional.pad(pairs, (0, more))
    for group, selection, means in own:
        chosen = slice(None) if group.heads is None else group.index(call.device)
        used, rows = means.keys.shape[2], means.pairs.shape[2]
        pairs[:, chosen], log_counts[:, chosen] = False, float("-inf")
        keys[:, chosen, :used], values[:, chosen, :used] = means.keys.to(keys.dtype), means.values.to(values.dtype)
        log_counts[:, chosen, :used] = means.log_counts.to(log_counts.dtype)
        pairs[:, chosen, :rows, :used] = means.pairs & ~selection.mask.all(-1, keepdim=True)[:, :, :rows]
    return Means(keys, values, log_counts, pairs)


def _has_tail(laid: Laid, call: Call) -> torch.Tensor:
    """bool [1, H, 1]."""
    has = torch.ones(1, call.q.shape[1], 1, dtype=torch.bool, device=call.device)
    for group, selection in laid.parts:
        if not selection.tail:
            has[:, slice(None) if group.heads is None else group.index(call.device)] = False
    return has


def _rectified(call: Call, laid: Laid, sparse: torch.Tensor) -> torch.Tensor:
    """R·o + Σ p̂ v̄ over dropped blocks, p̂ the softmax of pooled scores and R the rest of it.

    A dropped block whose mean would mislead more than it helps is left out of the sum and counts to R: where
    |q̄|·mean|Δk| and mean|Δq|·|k̄| exceed |q̄·k̄| (Rectified SpaAttn, "gain-aware pooling").
    """
    layout = laid.layout
    q, k, v = (
        in_order(x, order)
        for x, order in ((call.q, layout.query_order), (call.k, layout.key_order), (call.v, layout.key_order))
    )
    q_means, q_spread, _ = _mean_and_spread(q, layout.query_bounds, None, None)
    k_means, k_spread, counts = _mean_and_spread(k, layout.key_bounds, layout.key_lengths, layout.key_order)
    v_means = pool_blocks(v, layout.key_bounds, layout.key_lengths, layout.key_order)[0].float()
    scores = q_means @ k_means.mT
    error = (q_spread @ k_means.mT).abs() + (q_means @ k_spread.mT).abs()
    masses = (scores * call.scale + counts.log()[:, :, None]).softmax(-1)
    pooled = dropped_of(layout) & (scores.abs() > error) & _has_tail(laid, call)[..., None]
    masses = masses * pooled
    block_of = layout.query_block_of_place(*q.shape[:2])[..., None]
    rest = restore_order((1 - masses.sum(-1, keepdim=True)).gather(2, block_of), layout.query_order)
    added = (masses @ v_means).gather(2, block_of.expand(-1, -1, -1, v.shape[-1]))
    return (rest * sparse.float() + restore_order(added, layout.query_order)).to(sparse.dtype)


def _mean_and_spread(
    x: torch.Tensor, bounds: torch.Tensor, lengths: torch.Tensor | None, order: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and mean absolute deviations of every block, float32, and the counts of valid tokens."""
    means, counts = pool_blocks(x, bounds, lengths, order)
    means = means.float()
    of_place = block_of_place(bounds, x.shape[2])[..., None].expand_as(x)
    spread = pool_blocks((x.float() - means.gather(2, of_place)).abs(), bounds, lengths, order)[0]
    return means, spread, counts


def _rescaled(call: Call, sparse: torch.Tensor) -> torch.Tensor:
    if "kept mass" not in call.memory:
        call.notes["tail none: rescaled has no dense step to remember"] += 1
        return sparse
    return (call.memory["kept mass"] * sparse + call.memory["rest"]).to(sparse.dtype)
