"""SLA: critical, marginal and negligible pairs, and the projection of the linear branch."""

import itertools
from dataclasses import replace

import pytest
import torch

from pattern_checks import laid_out, make_call, selected, video_mask
from pointillist.accel.layouts import Group, lay_out, sub_call
from pointillist.accel.patterns.sla import Sla
from pointillist.accel.tails import attend
from pointillist.accel.tiles import Segment

TEXT_BEFORE = (Segment("text", 0, 5), Segment("video", 5, 84), Segment("pad", 89, 3))


def shares(call, selection, density, negligible):
    """Two bool masks [B, H, n, n], critical and marginal pairs, from the formula: a row at a time."""
    order, bounds = selection.queries.order[0, 0], selection.queries.bounds[0, 0].tolist()
    blocks = [order[start:stop] for start, stop in itertools.pairwise(bounds)]
    n = len(blocks)
    critical = torch.zeros(*call.q.shape[:2], n, n, dtype=torch.bool)
    marginal = critical.clone()
    for b, h in torch.cartesian_prod(torch.arange(call.q.shape[0]), torch.arange(call.q.shape[1])).tolist():
        q, k = call.video_q[b, h], call.video_k[b, h] - call.video_k[b, h].mean(0)
        for i in range(n):
            scores = [float(q[blocks[i]].mean(0) @ k[blocks[j]].mean(0)) for j in range(n)]
            ranked = sorted(range(n), key=lambda j: (j != i, -scores[j]))
            kept = ranked[: max(1, round(density * n))]
            lowest = sorted(range(n), key=lambda j: scores[j])[: round(negligible * n)]
            critical[b, h, i, kept] = True
            marginal[b, h, i, [j for j in range(n) if j not in kept and j not in lowest]] = True
    return blocks, critical, marginal


def of_tokens(blocks, pairs):
    block_of = torch.empty(sum(map(len, blocks)), dtype=torch.int64)
    for number, tokens in enumerate(blocks):
        block_of[tokens] = number
    return pairs[:, :, block_of][..., block_of]


def linear(call, seen):
    """Σ φ(q)·φ(k) v / Σ φ(q)·φ(k) over the token pairs `seen`."""
    weights = call.video_q.softmax(-1) @ call.video_k.softmax(-1).mT * seen
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights @ call.video_v / total.clamp(min=1e-30), 0)


def run(pattern, call):
    """(sparse output, what `finish` makes of it)."""
    out = attend(call, laid_out(pattern, call), "none")
    return out, pattern.finish(sub_call(Group(pattern), call), out.clone())


@pytest.mark.parametrize(("grid", "negligible"), [((5, 6, 7), 0.1), ((3, 9, 4), 0.4), ((1, 11, 13), 0.0)])
def test_critical_pairs_are_kept_and_marginal_ones_linear(grid, negligible):
    weight, bias = torch.randn(16, 16), torch.randn(16)
    call = make_call(grid, smooth=2, weights={"proj_l.weight": weight, "proj_l.bias": bias})
    pattern = Sla(0.3, negligible=negligible)
    selection = selected(pattern, call)
    blocks, critical, marginal = shares(call, selection, 0.3, negligible)
    assert torch.equal(selection.mask, critical) and int(critical.sum()) == selection.pairs
    assert bool(marginal.any()) and (negligible == 0 or not bool((critical | marginal).all()))
    sparse, out = run(pattern, call)
    expected = sparse + linear(call, of_tokens(blocks, marginal)) @ weight.T + bias
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert not call.notes


def test_as_released_the_linear_branch_sees_everything():
    call = make_call((3, 6, 7), smooth=2, weights={"proj_l.weight": torch.randn(16, 16)})
    sparse, out = run(Sla(0.3, marginal=False), call)
    expected = sparse + linear(call, torch.ones(1, 1, 126, 126)) @ call.weights["proj_l.weight"].T
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_projection_or_with_zeros_it_is_top_k(dtype):
    call = make_call((3, 6, 7), smooth=2)
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
    sparse, out = run(Sla(0.3), call)
    assert torch.equal(out, sparse)
    assert list(call.notes) == ["sla: no trained weights (proj_l.weight) at this site: top-k alone"]
    sparse, out = run(Sla(0.3), replace(call, weights={"proj_l.weight": torch.zeros(16, 16)}, memory={}))
    assert torch.equal(out, sparse) and out.dtype == dtype
    sparse, out = run(Sla(0.3), replace(call, weights={"proj_l.weight": torch.eye(16)}, memory={}))
    assert not torch.equal(out, sparse) and out.dtype == dtype


def test_text_is_left_alone():
    """The linear branch is for the video's rows and columns; text has been exact before."""
    weight = torch.randn(16, 16)
    call = make_call((2, 6, 7), segments=TEXT_BEFORE, smooth=2, weights={"proj_l.weight": weight})
    sparse, out = run(Sla(0.3), call)
    assert torch.equal(out[:, :, :5], sparse[:, :, :5]) and torch.equal(out[:, :, 89:], sparse[:, :, 89:])
    selection = selected(Sla(0.3), call)
    blocks, _, marginal = shares(call, selection, 0.3, 0.1)
    added = linear(call, of_tokens(blocks, marginal)) @ weight.T
    torch.testing.assert_close(out[:, :, 5:89], sparse[:, :, 5:89] + added, atol=1e-4, rtol=1e-4)


def test_some_heads_alone():
    """Heads beside others get what they get when all are alike."""
    call = make_call((3, 6, 7), smooth=2, weights={"proj_l.weight": torch.randn(16, 16)})
    pattern = Sla(0.3)
    _, together = run(pattern, call)
    group = Group(pattern, (2, 0))
    own = sub_call(group, replace(call, memory={}))
    part = pattern.select(own)
    laid = lay_out([(Group(pattern), part)], own)
    alone = pattern.finish(own, attend(own, laid, "none"))
    torch.testing.assert_close(alone, together[:, [2, 0]])


def test_a_projection_of_another_shape_is_refused():
    call = make_call((3, 6, 7), weights={"proj_l.weight": torch.zeros(16, 8)})
    with pytest.raises(ValueError, match=r"proj_l.weight is \[16, 8\]; it must be \[16, 16\]"):
        run(Sla(0.3), call)


def test_kept_pairs_are_those_of_the_layout():
    call = make_call((5, 6, 7), smooth=2)
    selection = selected(Sla(0.25), call)
    blocks, critical, _ = shares(call, selection, 0.25, 0.1)
    assert torch.equal(video_mask(laid_out(Sla(0.25), call), call), of_tokens(blocks, critical))
