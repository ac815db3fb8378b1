"""`space_time` against its definition: bands of tokens, and the kind of a head by the error on sampled rows."""

from dataclasses import replace

import pytest
import torch

from pattern_checks import assert_covers, covered, laid_out, make_call, selected, video_mask
from pointillist.accel.blocks import Blocks
from pointillist.accel.patterns.rows import sampled_places
from pointillist.accel.patterns.space_time import SpaceTime


def places_in(kind, grid):
    """int64 [N]: every token's place, frame by frame or place by place."""
    frames, height, width = grid
    tokens = torch.arange(frames * height * width)
    return tokens if kind == 0 else tokens % (height * width) * frames + tokens // (height * width)


def plain_band(kind, grid, density, sink, queries, keys):
    """bool [N, N]: |i − j| ≤ w, and the first frame if it is a sink, for the w whose density is nearest."""
    place, tokens = places_in(kind, grid), grid[0] * grid[1] * grid[2]
    apart = (place - place[:, None]).abs()
    if sink:
        apart[:, : grid[1] * grid[2]] = 0
    area, best = queries.sizes[0, 0][:, None] * keys.sizes[0, 0], None
    for width in range(tokens):
        mask = covered((apart <= width)[None, None], queries, keys)[0, 0]
        off = abs(float((mask * area).sum()) / tokens**2 - density)
        if best is None or off < best[0]:
            best = off, apart <= width, mask
    return best[1], best[2]


def blocks_of_head(blocks, b, h):
    order = blocks.order[b, h][None, None]
    return Blocks(order, blocks.bounds, blocks.largest)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("grid", "density"), [((3, 5, 4), 0.45), ((4, 3, 7), 0.5), ((5, 3, 4), 0.7)])
def test_heads_keep_the_band_whose_output_is_nearer_to_the_dense_one(grid, density, sink):
    call = make_call(grid, smooth=1, block=8)
    call = replace(call, q=2 * call.q.double(), k=call.k.double(), v=call.v.double())
    pattern, tokens = SpaceTime(density, sink=sink), grid[0] * grid[1] * grid[2]
    selection = selected(pattern, call)
    kept, wanted = video_mask(laid_out(pattern, call), call), torch.zeros(2, 3, tokens, tokens, dtype=torch.bool)
    bands, kinds = {}, set()
    for b in range(2):
        for h in range(3):
            kind = 0 if torch.equal(selection.queries.order[b, h], torch.arange(tokens)) else 1
            if kind not in bands:
                each = (blocks_of_head(blocks, b, h) for blocks in (selection.queries, selection.keys))
                bands[kind] = plain_band(kind, grid, density, sink, *each)
            wanted[b, h], mask = bands[kind]
            assert torch.equal(selection.mask[b, h], mask)
            kinds.add(kind)
    assert_covers(pattern, call, wanted)
    if kinds == {0, 1}:
        by_kind = {
            kind: next(
                kept[b, h]
                for b in range(2)
                for h in range(3)
                if torch.equal(selection.queries.order[b, h].argsort(), places_in(kind, grid))
            )
            for kind in kinds
        }
        for b in range(2):
            for h in range(3):
                weights = (call.q[b, h] @ call.k[b, h].T * call.scale).exp()
                errors = []
                for kind in (0, 1):
                    error = 0.0
                    for row in sampled_places(tokens):
                        dense = weights[row] @ call.v[b, h] / weights[row].sum()
                        part = weights[row] * by_kind[kind][row]
                        error += float((part @ call.v[b, h] / part.sum() - dense).square().sum())
                    errors.append(error)
                assert torch.equal(selection.queries.order[b, h].argsort(), places_in(int(errors[1] < errors[0]), grid))


def call_with_kinds(kinds, grid=(6, 5, 4)):
    """Heads whose queries look at their frame (0), or at their place in all frames (1)."""
    frame = torch.randn(grid[0], 32)
    place = torch.randn(grid[1] * grid[2], 32)
    tokens = torch.arange(grid[0] * grid[1] * grid[2])
    alike = [(frame[tokens // len(place)], place[tokens % len(place)])[kind] for kind in kinds]
    q = 5 * torch.nn.functional.normalize(torch.stack(alike)[None], dim=-1)
    call = make_call(grid, batch=1, heads=len(kinds), dim=32, block=8)
    return replace(call, q=q, k=q, scale=1.0)


def kinds_of(selection):
    natural = torch.arange(selection.queries.order.shape[-1])
    return [0 if torch.equal(order, natural) else 1 for order in selection.queries.order[0]]


def test_heads_are_what_they_look_at():
    call = call_with_kinds((0, 1, 1, 0))
    assert kinds_of(selected(SpaceTime(0.3), call)) == [0, 1, 1, 0]
    both = replace(call, **{name: torch.cat([getattr(call, name), getattr(call, name).flip(1)]) for name in "qkv"})
    orders = selected(SpaceTime(0.3), both).queries.order
    assert torch.equal(orders[1], orders[0].flip(0)), "every batch entry has kinds of its own"


def test_a_kind_is_kept_for_some_steps():
    calls = [call_with_kinds((0, 1)), call_with_kinds((1, 0))]
    for every, expected in ((1, [0, 1, 0, 1, 0]), (2, [0, 0, 0, 0, 0]), (3, [0, 0, 0, 1, 1])):
        memory, found = {}, []
        for step in range(5):
            call = replace(calls[step % 2], step=step, memory=memory)
            found.append(kinds_of(selected(SpaceTime(0.3, every=every), call))[0])
        assert found == expected


def test_the_sink_is_the_first_frame_in_either_order():
    """Not the first keys of the order, which in the temporal one are others."""
    call = call_with_kinds((0, 1))
    kept = video_mask(laid_out(SpaceTime(0.4, sink=True), call), call)
    assert kinds_of(selected(SpaceTime(0.4, sink=True), call)) == [0, 1]
    assert kept[:, :, :, :20].all()
    assert not kept[:, :, :, 20:].all(2).any()
    assert kept.diagonal(dim1=-2, dim2=-1).all()


def test_an_image_has_one_kind_and_no_sink():
    call = make_call((1, 6, 7))
    plain, sink = (selected(SpaceTime(0.4, sink=sink), call) for sink in (False, True))
    assert kinds_of(plain) == [0, 0, 0] and torch.equal(plain.mask, sink.mask)
    assert int(sink.mask.sum()) < sink.mask.numel()
