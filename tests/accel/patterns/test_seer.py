"""SeerAttention: the trained gate over pooled queries and keys."""

import itertools
from dataclasses import replace

import pytest
import torch

from pattern_checks import laid_out, make_call, selected, video_mask
from pointillist.accel.layouts import Group, sub_call
from pointillist.accel.patterns.pooled import Pooled
from pointillist.accel.patterns.seer import Seer


def gates(width=12, heads=()):
    return {
        "attn_gate_q.weight": torch.randn(*heads, width, 16),
        "attn_gate_k.weight": torch.randn(*heads, width, 48),
    }


def expected_rows(call, blocks, weights, density):
    """bool [B, H, n, n]: the highest of every row of the gate, its own block first; plain loops over blocks."""
    order, bounds = blocks.order[0, 0], blocks.bounds[0, 0].tolist()
    tokens = [order[start:stop] for start, stop in itertools.pairwise(bounds)]
    n = len(tokens)
    kept = torch.zeros(*call.q.shape[:2], n, n, dtype=torch.bool)
    for b in range(call.q.shape[0]):
        for h in range(call.q.shape[1]):
            gate_q, gate_k = (w if w.ndim == 2 else w[h] for w in weights.values())
            q = [gate_q @ call.video_q[b, h, each].mean(0) for each in tokens]
            k = [call.video_k[b, h, each] for each in tokens]
            k = [gate_k @ torch.cat([each.max(0).values, each.min(0).values, each.mean(0)]) for each in k]
            for i in range(n):
                row = [float(q[i] @ k[j]) for j in range(n)]
                ranked = sorted(range(n), key=lambda j: (j != i, -row[j]))
                kept[b, h, i, ranked[: max(1, round(density * n))]] = True
    return kept


@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("grid", [(5, 6, 7), (3, 9, 4), (1, 11, 13)])
def test_the_gate_chooses(grid, heads):
    call = make_call(grid, weights=gates(heads=heads))
    selection = selected(Seer(0.3), call)
    assert torch.equal(selection.mask, expected_rows(call, selection.keys, call.weights, 0.3))
    assert int(selection.mask.sum()) == selection.pairs and not call.notes


def test_the_rule_sees_the_softmax_of_the_gate():
    """`mass` keeps what a threshold on the gate's probabilities would: √Dg matters there."""
    call = make_call((3, 6, 7), batch=1, heads=12, weights=gates(), block=21)
    call.weights["attn_gate_q.weight"].mul_(0.1)
    selection = selected(Seer(0.4, rule="mass"), call)
    tokens = selection.keys.order[0, 0].view(6, 21)
    for head in range(12):
        q, k = call.video_q[0, head][tokens], call.video_k[0, head][tokens]
        gate_q = q.mean(1) @ call.weights["attn_gate_q.weight"].T
        gate_k = torch.cat([k.amax(1), k.amin(1), k.mean(1)], -1) @ call.weights["attn_gate_k.weight"].T
        masses = (gate_q @ gate_k.T / 12**0.5).softmax(-1)
        ranked = []
        for i in range(6):
            before = float(masses[i, i])
            for j in sorted((j for j in range(6) if j != i), key=masses[i].tolist().__getitem__, reverse=True):
                ranked.append((before, i, j))
                before += float(masses[i, j])
        expected = torch.eye(6, dtype=torch.bool)
        for _, i, j in sorted(ranked)[:8]:  # with the diagonal 14 of 36
            expected[i, j] = True
        assert torch.equal(selection.mask[0, head], expected)


@pytest.mark.parametrize("weights", [{}, {"attn_gate_q.weight": torch.randn(12, 16)}])
@pytest.mark.parametrize("order", ["frames", "tiles"])
def test_without_both_gates_it_is_pooled(weights, order):
    call = make_call((5, 6, 7), smooth=2, weights=weights)
    found = video_mask(laid_out(Seer(0.3, order), call), call)
    assert torch.equal(found, video_mask(laid_out(Pooled(0.3, order), replace(call, memory={})), call))
    assert len(call.notes) == 1 and "seer: no trained weights (" in next(iter(call.notes))
    assert "attn_gate_k.weight" in next(iter(call.notes))


def test_some_heads_have_their_own_gates():
    call = make_call((3, 6, 7), weights=gates(heads=(3,)))
    pattern = Seer(0.3)
    together = selected(pattern, call).mask
    own = sub_call(Group(pattern, (2, 0)), replace(call, memory={}))
    assert torch.equal(pattern.select(own).mask, together[:, [2, 0]])


def test_gates_of_another_shape_are_refused():
    weights = {**gates(), "attn_gate_k.weight": torch.randn(12, 32)}
    with pytest.raises(ValueError, match=r"attn_gate_k.weight is \[12, 32\]; it must be \[any, 48\] or \[3, any, 48\]"):
        selected(Seer(0.3), make_call((3, 6, 7), weights=weights))
