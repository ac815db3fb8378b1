"""`pyramid` against a plain definition: levels by the mass before a block, and one softmax over keys of every size."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pattern_checks import laid_out, make_call, selected
from pointillist.accel.patterns.pyramid import Pyramid
from pointillist.accel.patterns.sampled import Sampled
from pointillist.accel.tails import attend
from pointillist.accel.tiles import Segment

GRID = (5, 6, 7)
ALL = 1000
"""Samples: every token of a block, so that the importance is that of the attention itself."""


def double_call(**options):
    call = make_call(GRID, batch=2, heads=2, smooth=2, **options)
    return replace(call, q=2 * call.q.double(), k=2 * call.k.double(), v=call.v.double())


def members(blocks):
    order, bounds = blocks.order[0, 0].tolist(), blocks.bounds[0, 0].tolist()
    return [order[start:stop] for start, stop in pairwise(bounds)]


def plain_levels(weights, tokens, kept, levels, share):
    """Of each dropped pair its level, 0 the finest and `levels` the rest. weights: attention [N, N] of one head."""
    found = {}
    for i, rows in enumerate(tokens):
        strongest = {j: float(weights[rows][:, columns].max()) for j, columns in enumerate(tokens)}
        masses = {j: strongest[j] * len(tokens[j]) for j in strongest if not kept[i, j]}
        before, total = 0.0, sum(masses.values())
        for j in sorted(masses, key=lambda j: -masses[j]):
            edges = [1 - (1 - share) ** level for level in range(1, levels + 1)]
            found[i, j] = sum(before / total >= edge for edge in edges)
            before += masses[j]
    return found


def runs_of(columns, size):
    return [columns[start : start + size] for start in range(0, len(columns), size)]


@pytest.mark.parametrize("order", ["tiles", "hilbert"])
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (4, 16, 16)),
        ({"levels": 3, "finest": 2, "growth": 2, "rest": "none", "share": 0.3}, (2, 4, 8)),
        ({"levels": 0}, (16,)),
        ({"levels": 1, "finest": 5, "rest": "none", "rule": "row"}, (5,)),
    ],
)
def test_output_is_one_softmax_over_keys_of_every_level(order, options, sizes):
    call = double_call()
    pattern = Pyramid(0.2, order=order, samples=ALL, **options)
    selection = selected(pattern, call)
    out = attend(call, laid_out(pattern, call), "pooled")
    tokens, expected, seen = members(selection.queries), torch.zeros_like(out), set()
    for b in range(2):
        for h in range(2):
            q, k, v = call.q[b, h], call.k[b, h], call.v[b, h]
            levels = plain_levels(
                (q @ k.mT * call.scale).softmax(-1), tokens, selection.mask[b, h], pattern.levels, pattern.share
            )
            seen |= set(levels.values())
            for i, rows in enumerate(tokens):
                groups = []
                for j, columns in enumerate(tokens):
                    if selection.mask[b, h, i, j]:
                        groups += runs_of(columns, 1)
                    elif levels[i, j] < len(sizes):
                        groups += runs_of(columns, sizes[levels[i, j]])
                keys, values = (torch.stack([x[group].mean(0) for group in groups]) for x in (k, v))
                bias = torch.tensor([math.log(len(group)) for group in groups], dtype=torch.float64)
                expected[b, h, rows] = (q[rows] @ keys.mT * call.scale + bias).softmax(-1) @ values
    assert seen == set(range(pattern.levels + 1))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_exact_blocks_are_those_of_sampled():
    """With another tail, nothing else is left of a pyramid."""
    call = double_call()
    for rule in ("mass", "row"):
        pattern, sampled = Pyramid(0.3, rule=rule, samples=4), Sampled(0.3, rule=rule, samples=4)
        assert torch.equal(selected(pattern, call).mask, selected(sampled, call).mask)
        for tail in ("none", "rectified"):
            outs = [attend(call, laid_out(each, call), tail) for each in (pattern, sampled)]
            torch.testing.assert_close(*outs)


def test_a_single_heavy_block_gets_the_finest_level():
    """Its own mass is beyond every level's, and what counts is the mass before it."""
    call = double_call()
    heavy = members(selected(Pyramid(0.2), call).keys)[5]
    q, k = torch.randn(2, 2, 210, 16).double() * 0.1, torch.randn(2, 2, 210, 16).double() * 0.1
    q[..., 0], k[..., heavy, 0] = 10, 4
    call = replace(call, q=q, k=k, memory={})
    selection = selected(Pyramid(0.01, rule="row", samples=ALL, share=0.3), call)
    masses = (q @ k.mT * call.scale).softmax(-1)[..., heavy].sum(-1)
    assert (masses > 0.95).all()
    assert selection.keys.sizes.unique().tolist() == [14.0]
    pairs = selection.means(call).pairs  # of 15 blocks: 4 runs of each, then each, then each
    fine, coarse = pairs[..., : 15 * 4].unflatten(-1, (15, 4)), pairs[..., 15 * 4 :].unflatten(-1, (2, 15))
    others = [i for i in range(15) if i != 5]
    assert fine[:, :, others, 5].all() and not coarse[:, :, others, :, 5].any()
    assert not fine[:, :, 5, 5].any() and not coarse[:, :, 5, :, 5].any()  # its own queries see it exactly


@pytest.mark.parametrize("rest", ["mean", "none"])
def test_every_dropped_token_counts_once(rest):
    call = make_call((5, 7, 9), block=20, smooth=2)
    selection = selected(Pyramid(0.15, rest=rest, finest=3, growth=2), call)
    means = selection.means(call)
    stood_for = (means.pairs * means.log_counts.exp()[:, :, None]).sum(-1)
    exact = (selection.mask * selection.keys.sizes[..., None, :]).sum(-1)
    if rest == "mean":
        torch.testing.assert_close(stood_for + exact, torch.full_like(exact, 315))
    else:
        assert (stood_for > 0).all() and (stood_for + exact < 315).any()


def test_runs_of_single_tokens_are_dense_attention():
    """In a sequence with text and padding, too."""
    segments = (Segment("text", 0, 5), Segment("video", 5, 210), Segment("pad", 215, 4))
    call = make_call(GRID, segments=segments, smooth=2)
    pattern = Pyramid(0.3, levels=1, finest=1, share=1.0)
    dense = (call.q @ call.k.mT * call.scale).softmax(-1) @ call.v
    out = attend(call, laid_out(pattern, call), "pooled")
    torch.testing.assert_close(out, dense, atol=1e-4, rtol=1e-4)
    half = replace(call, q=call.q.bfloat16(), k=call.k.bfloat16(), v=call.v.bfloat16(), memory={})
    torch.testing.assert_close(attend(half, laid_out(pattern, half), "pooled").float(), dense, atol=0.05, rtol=0.05)


def test_a_finer_tail_errs_less():
    """What the levels are for: at equal exact blocks, nearer to dense attention than the means of the dropped ones."""
    call = make_call((4, 8, 8), smooth=3)
    call = replace(call, q=2 * call.q)
    dense = (call.q @ call.k.mT * call.scale).softmax(-1) @ call.v
    errors = [
        float((attend(call, laid_out(pattern, call), "pooled") - dense).square().mean())
        for pattern in (Pyramid(0.2, finest=2, growth=2), Pyramid(0.2), Sampled(0.2))
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize("options", [{"rest": "all"}, {"levels": -1}, {"finest": 0}, {"growth": 1}, {"share": 1.5}])
def test_wrong_values_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Pyramid(0.3, **options)


def test_nothing_waits_for_the_device():
    """Fake tensors have no values to wait for."""
    call, pattern = make_call(GRID), Pyramid(0.3)
    pattern.select(call).means(call)  # fills the caches
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = replace(call, q=mode.from_tensor(call.q), k=mode.from_tensor(call.k), v=mode.from_tensor(call.v))
        assert pattern.select(fake).means(fake).keys.shape[:2] == (2, 3)
