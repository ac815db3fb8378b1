"""`skip`: heads whose video queries give 0 or what they gave at the last dense step."""

from dataclasses import replace

import pytest
import torch

from pattern_checks import laid_out, make_call, selected, video_mask
from pointillist.accel.layouts import Group, lay_out, select, sub_call
from pointillist.accel.patterns.skip import Skip
from pointillist.accel.patterns.window import Window
from pointillist.accel.tails import attend
from pointillist.accel.tiles import Segment

GRID = (3, 6, 7)
BESIDE = (Segment("text", 0, 9), Segment("video", 9, 126), Segment("condition", 135, 5))


def computed(pattern, call, tail="none", **options):
    out = attend(call, laid_out(pattern, call, **options), tail)
    return pattern.finish(sub_call(Group(pattern), call), out)


def test_it_keeps_nothing_and_asks_for_no_tail():
    call = make_call(GRID)
    selection = selected(Skip(0.5), call)
    assert not selection.mask.any() and selection.pairs == 0 and not selection.tail
    assert not video_mask(laid_out(Skip(0.5), call), call).any()


@pytest.mark.parametrize("tail", ["none", "pooled", "rectified", "rescaled"])
def test_a_skipped_head_is_0_and_leaves_the_others_alone(tail):
    call = make_call(GRID)
    groups = Group(Skip(0.5), (1,)), Group(Window(0.3), (0, 2))
    laid = lay_out([(group, select(group, call)) for group in groups], call)
    out = attend(call, laid, tail)
    assert (out[:, 1] == 0).all()
    alone = attend(call, laid_out(Window(0.3), call), tail)
    torch.testing.assert_close(out[:, [0, 2]], alone[:, [0, 2]])


@pytest.mark.parametrize("segments", [None, BESIDE])
@pytest.mark.parametrize("reuse", [False, True])
def test_video_rows_are_0_or_reused_and_the_others_exact(segments, reuse):
    call = make_call(GRID, segments=segments)
    dense = (call.q @ call.k.mT * call.scale).softmax(-1) @ call.v
    last = torch.randn_like(call.q)
    remembered = last.clone()
    pattern = Skip(0.5, reuse=reuse)
    pattern.prepare(sub_call(Group(pattern), call), remembered)
    remembered.zero_()  # whoever made it may write over it
    expected = dense
    rows = slice(9, 135) if segments else slice(None)
    expected[:, :, rows] = last[:, :, rows] if reuse else 0
    torch.testing.assert_close(computed(pattern, call), expected)


def test_the_latest_dense_step_is_reused():
    call = make_call(GRID)
    pattern = Skip(0.5, reuse=True)
    for _ in range(2):
        last = torch.randn_like(call.q)
        pattern.prepare(sub_call(Group(pattern), call), last)
    assert torch.equal(computed(pattern, call), last)


def test_a_first_frame_that_is_to_be_dense_stays_so():
    call = make_call(GRID)
    dense = (call.q @ call.k.mT * call.scale).softmax(-1) @ call.v
    pattern, last = Skip(0.5, reuse=True), torch.randn_like(call.q)
    pattern.prepare(sub_call(Group(pattern), call), last)
    out = computed(pattern, call, dense_first_frame=True)
    torch.testing.assert_close(out[:, :, :42], dense[:, :, :42])
    assert torch.equal(out[:, :, 42:], last[:, :, 42:])


def test_with_nothing_to_reuse_it_says_so_and_gives_0():
    call = make_call(GRID)
    assert (computed(Skip(0.5, reuse=True), call) == 0).all()
    assert sum(call.notes.values()) == 1 and "no dense step" in next(iter(call.notes))
    quiet = make_call(GRID)
    computed(Skip(0.5), quiet)
    assert not quiet.notes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    call = make_call(GRID)
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
    pattern = Skip(0.5, reuse=True)
    pattern.prepare(sub_call(Group(pattern), call), call.v)
    assert computed(pattern, call).dtype == dtype
