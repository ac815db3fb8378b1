"""VSA: cubes by coarse attention, and its gated output."""

import itertools
from dataclasses import replace

import pytest
import torch

from pattern_checks import laid_out, make_call, selected
from pointillist.accel.layouts import Group, lay_out, sub_call
from pointillist.accel.patterns.vsa import Vsa
from pointillist.accel.tails import attend
from pointillist.accel.tiles import Segment

CHANNELS = 20


def trained_call(grid, **others):
    """A call with a gate of 3 heads × 16, and the input of its attention module."""
    weights = {
        "to_gate_compress.weight": torch.randn(48, CHANNELS),
        "to_gate_compress.bias": torch.randn(48),
    }
    call = make_call(grid, smooth=2, weights=weights, **others)
    return replace(call, hidden_states=torch.randn(2, call.q.shape[2], CHANNELS))


def coarse(call, blocks):
    """Probabilities [B, H, n, n] among cubes, and the coarse output of every token [B, H, N, D]; loops over cubes."""
    order, bounds = blocks.order[0, 0], blocks.bounds[0, 0].tolist()
    cubes = [order[start:stop] for start, stop in itertools.pairwise(bounds)]
    q, k, v = (
        torch.stack([x[:, :, cube].mean(2) for cube in cubes], 2) for x in (call.video_q, call.video_k, call.video_v)
    )
    probabilities = (torch.einsum("bhid,bhjd->bhij", q, k) / call.q.shape[-1] ** 0.5).softmax(-1)
    out = torch.empty_like(call.video_q)
    for i, cube in enumerate(cubes):
        out[:, :, cube] = torch.einsum("bhj,bhjd->bhd", probabilities[:, :, i], v)[:, :, None]
    return probabilities, out


def run(pattern, call):
    out = attend(call, laid_out(pattern, call), "none")
    return out, pattern.finish(sub_call(Group(pattern), call), out.clone())


@pytest.mark.parametrize("grid", [(5, 6, 7), (3, 9, 4), (1, 11, 13)])
def test_cubes_of_the_highest_coarse_probabilities(grid):
    call = make_call(grid, smooth=2)
    selection = selected(Vsa(0.3), call)
    probabilities, _ = coarse(call, selection.queries)
    n = selection.keys.count
    expected = torch.zeros(2, 3, n, n, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(length) for length in (2, 3, n))).tolist():
        row = probabilities[b, h, i].tolist()
        ranked = sorted(range(n), key=lambda j: (j != i, -row[j]))
        expected[b, h, i, ranked[: max(1, round(0.3 * n))]] = True
    assert torch.equal(selection.mask, expected) and int(expected.sum()) == selection.pairs


@pytest.mark.parametrize("segments", [None, (Segment("text", 0, 5), Segment("video", 5, 210), Segment("pad", 215, 3))])
def test_the_gate_weighs_the_coarse_output(segments):
    call = trained_call((5, 6, 7), segments=segments)
    sparse, out = run(Vsa(0.3), call)
    start = 0 if segments is None else 5
    hidden = call.hidden_states[:, start : start + 210]
    gate = hidden @ call.weights["to_gate_compress.weight"].T + call.weights["to_gate_compress.bias"]
    gate = gate.view(2, 210, 3, 16).transpose(1, 2)
    expected = sparse.clone()
    expected[:, :, start : start + 210] += gate * coarse(call, selected(Vsa(0.3), call).queries)[1]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert not call.notes


def test_some_heads_have_their_part_of_the_gate():
    call = trained_call((3, 6, 7))
    pattern = Vsa(0.3)
    _, together = run(pattern, call)
    own = sub_call(Group(pattern, (2, 0)), replace(call, memory={}))
    laid = lay_out([(Group(pattern), pattern.select(own))], own)
    alone = pattern.finish(own, attend(own, laid, "none"))
    torch.testing.assert_close(alone, together[:, [2, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gate_or_with_zeros_it_is_sparse_alone(dtype):
    call = trained_call((3, 6, 7))
    call = replace(
        call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), hidden_states=call.hidden_states.to(dtype)
    )
    zeros = {"to_gate_compress.weight": torch.zeros(48, CHANNELS)}
    for weights, note in (
        ({}, ["vsa: no trained weights (to_gate_compress.weight) at this site: top-k alone"]),
        (zeros, []),
    ):
        call = replace(call, weights=weights, memory={}, notes=type(call.notes)())
        sparse, out = run(Vsa(0.3), call)
        assert torch.equal(out, sparse) and out.dtype == dtype and list(call.notes) == note
    ones = {"to_gate_compress.weight": torch.ones(48, CHANNELS)}
    sparse, out = run(Vsa(0.3), replace(call, weights=ones, memory={}))
    assert not torch.equal(out, sparse) and out.dtype == dtype


def test_a_call_without_the_modules_input_says_so():
    call = replace(trained_call((3, 6, 7)), hidden_states=None)
    sparse, out = run(Vsa(0.3), call)
    assert torch.equal(out, sparse) and "the input of the attention module is not known" in next(iter(call.notes))


def test_a_gate_of_another_shape_is_refused():
    call = replace(trained_call((3, 6, 7)), weights={"to_gate_compress.weight": torch.zeros(16, CHANNELS)})
    with pytest.raises(ValueError, match=r"\[16, 20\]; it must be \[48, 20\]"):
        run(Vsa(0.3), call)
