"""Tails against their formulas, block by block in plain loops."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pattern_checks import laid_out, make_call
from pointillist.accel.layouts import Group, lay_out, select
from pointillist.accel.patterns import pattern_class
from pointillist.accel.tails import attend, remember_kept_mass, remember_loss

GRID = (3, 6, 7)


def dense(call):
    return torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)


def blocks_of(call, laid):
    order, bounds = laid.layout.query_order[0, 0], laid.layout.query_bounds[0, 0].tolist()
    return [order[a:b] for a, b in pairwise(bounds)]


def test_rectified_is_its_formula():
    call = make_call(GRID, smooth=2)
    laid = laid_out(pattern_class("pooled")(0.3), call)
    kept, blocks = laid.layout.mask(), blocks_of(call, laid)
    expected = attend(call, laid, "none").double()
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    left_out = 0
    for b, h in ((0, 0), (1, 2)):
        for i, rows in enumerate(blocks):
            q_mean = q[b, h, rows].mean(0)
            logits = [float(q_mean @ k[b, h, keys].mean(0)) * call.scale + math.log(len(keys)) for keys in blocks]
            masses = torch.tensor(logits, dtype=torch.float64).softmax(0)
            added, rest = torch.zeros(q.shape[-1], dtype=torch.float64), 1.0
            for j, keys in enumerate(blocks):
                k_mean = k[b, h, keys].mean(0)
                spread_q, spread_k = (
                    (x - m).abs().mean(0) for x, m in ((q[b, h, rows], q_mean), (k[b, h, keys], k_mean))
                )
                gain, error = abs(q_mean @ k_mean), abs(spread_q @ k_mean) + abs(q_mean @ spread_k)
                if kept[b, h, i, j]:
                    continue
                if gain <= error:
                    left_out += 1
                    continue
                added, rest = added + masses[j] * v[b, h, keys].mean(0), rest - masses[j]
            expected[b, h, rows] = rest * expected[b, h, rows] + added
    assert left_out > 0
    out = attend(call, laid, "rectified")
    for b, h in ((0, 0), (1, 2)):
        torch.testing.assert_close(out[b, h].double(), expected[b, h], atol=1e-5, rtol=1e-4)


def test_rescaled_gives_the_remembered_step_back_exactly():
    call = make_call(GRID, smooth=2)
    laid = laid_out(pattern_class("pooled")(0.3), call)
    remember_kept_mass(call, laid, dense(call))
    torch.testing.assert_close(attend(call, laid, "rescaled"), dense(call), atol=1e-5, rtol=1e-4)
    share = call.memory["kept mass"][..., 0]
    scores = call.q.double() @ call.k.double().mT * call.scale
    mass = (scores.softmax(-1) * laid.layout.token_mask(2, 3)).sum(-1)
    torch.testing.assert_close(share.double(), mass, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tail", ["none", "pooled", "rectified"])
def test_what_a_dense_step_lost_is_added_ever_less(tail):
    call = replace(make_call(GRID, smooth=2), step=2, steps=10)
    laid = laid_out(pattern_class("pooled")(0.3), call)
    plain = attend(call, laid, tail)
    remember_loss(call, laid, dense(call), tail)
    torch.testing.assert_close(attend(call, laid, tail), dense(call), atol=1e-5, rtol=1e-4)
    for step, weight in ((6, 0.5), (9, 0.125)):
        later = attend(replace(call, step=step), laid, tail)
        torch.testing.assert_close(later, plain + weight * (dense(call) - plain), atol=1e-5, rtol=1e-4)


def test_means_of_a_pattern_are_not_seen_by_a_dense_first_frame():
    """Its queries see every key exactly; a mean beside them would count keys twice."""
    call = make_call((3, 6, 7))
    pattern = pattern_class("pyramid")(0.3, order="frames")
    laid = laid_out(pattern, call, dense_first_frame=True)
    out = attend(call, laid, "pooled")
    torch.testing.assert_close(out[:, :, :42], dense(call)[:, :, :42], atol=1e-5, rtol=1e-4)
    assert float((out - dense(call))[:, :, 42:].norm()) > 0.1


def test_rescaled_without_a_dense_step_says_so():
    call = make_call(GRID)
    laid = laid_out(pattern_class("pooled")(0.3), call)
    assert torch.equal(attend(call, laid, "rescaled"), attend(call, laid, "none"))
    assert any("rescaled" in note for note in call.notes)


@pytest.mark.parametrize("tail", ["pooled", "rectified", "rescaled"])
def test_skipped_heads_have_no_tail(tail):
    call = make_call(GRID, heads=3)
    parts = [(group, select(group, call)) for group in (
        Group(pattern_class("window")(0.3), (0, 2)), Group(pattern_class("random")(0.3), (1,)),
    )]  # fmt: skip
    none = parts[1][1]
    parts[1] = (parts[1][0], replace(none, mask=torch.zeros_like(none.mask), tail=False))
    laid = lay_out(parts, call)
    remember_kept_mass(call, laid, dense(call))
    out = attend(call, laid, tail)
    assert (out[:, 1] == 0).all() and (out[:, [0, 2]] != 0).any()


def test_a_quantised_call_takes_a_tail():
    """INT8 products of kept pairs and means in full precision: near to the exact call, and not equal to it."""
    call = make_call(GRID, dim=32, smooth=1)
    laid = laid_out(pattern_class("pooled")(0.3), call)
    exact, rounded = (attend(call, laid, "pooled", kind) for kind in ("none", "int8"))
    assert not torch.equal(exact, rounded)
    assert float((exact - rounded).norm() / exact.norm()) < 0.03


def test_every_tail_is_nearer_to_dense_than_none():
    """On smooth q and k, where block means say something."""
    call = make_call((4, 8, 8), heads=8, smooth=3, seed=3)
    laid = laid_out(pattern_class("pooled")(0.2), call)
    error = {tail: float((attend(call, laid, tail) - dense(call)).norm()) for tail in ("none", "pooled", "rectified")}
    assert error["pooled"] < error["none"] and error["rectified"] < error["none"]
