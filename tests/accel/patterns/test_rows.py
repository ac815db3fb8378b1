"""Sampled softmax rows and what patterns make of them."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pattern_checks import make_call, selected
from pointillist.accel.patterns import pattern_class
from pointillist.accel.patterns.rows import (
    diagonal_masses,
    lowest_within,
    ranks_of,
    sampled_index,
    sampled_places,
    softmax_rows,
)
from pointillist.accel.tiles import Segment


@pytest.mark.parametrize("length", [1, 7, 64, 65, 210, 32760])
def test_every_run_of_the_video_gives_one_place(length):
    places = sampled_places(length)
    count = min(64, length)
    assert len(places) == count and len(set(places)) == count
    assert all(run * length // count <= place < (run + 1) * length // count for run, place in enumerate(places))
    assert sampled_index(length, torch.device("cpu")).tolist() == list(places)


def test_places_fall_into_all_columns_and_rows_of_a_frame():
    """At equal distances, 32 × 48 × 80 tokens would give the first column of two rows only."""
    places = sampled_places(32 * 48 * 80)
    assert len({place % 80 for place in places}) > 40
    assert len({place // 80 % 48 for place in places}) > 24


def test_rows_are_softmax_over_the_keys_of_the_video_alone():
    segments = (Segment("text", 0, 5), Segment("pad", 5, 3), Segment("video", 8, 42), Segment("text", 50, 4))
    call = make_call((2, 3, 7), segments=segments)
    rows = softmax_rows(call, torch.tensor([0, 17, 41]))
    for b in range(2):
        for h in range(3):
            for row, token in enumerate((0, 17, 41)):
                weights = (call.k[b, h, 5:47] @ call.q[b, h, 8 + token] * call.scale).exp()
                torch.testing.assert_close(rows[b, h, row], weights / weights.sum())
    half = replace(call, q=call.q.bfloat16(), k=call.k.bfloat16())
    assert softmax_rows(half, torch.tensor([3])).dtype == torch.float32


def test_diagonals_are_summed_by_key_less_query():
    rows, places = torch.rand(2, 3, 4, 11), (0, 3, 7, 10)
    expected = torch.zeros(2, 3, 21)
    for row, place in enumerate(places):
        for key in range(11):
            expected[:, :, key - place + 10] += rows[:, :, row, key]
    torch.testing.assert_close(diagonal_masses(rows, places), expected)


def test_ranks_go_down_with_the_mass_and_ties_by_place():
    assert ranks_of(torch.tensor([0.2, 0.5, 0.2, 0.9])).tolist() == [2, 1, 3, 0]


def test_the_lowest_of_every_run():
    values = torch.stack([torch.randperm(29) for _ in range(6)]).view(2, 3, 29)
    first = torch.randint(0, 17, (5, 8))
    length = torch.randint(1, 13, (5, 8))
    length[0, :4] = torch.tensor([1, 2, 8, 12])
    found = lowest_within(values, first, length, 12)
    for i in range(5):
        for j in range(8):
            run = values[..., first[i, j] : first[i, j] + length[i, j]]
            assert torch.equal(found[:, :, i, j], run.amin(-1))


class NeverWaiting(TorchDispatchMode):
    """Refuses what would wait for a device: values taken to the host, and shapes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"), name
        if name.startswith("index"):
            for each in args[1] if isinstance(args[1], (list, tuple)) else ():
                assert each is None or each.dtype not in (torch.bool, torch.uint8), f"{name} by truth values"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grid", {}),
        ("grid", {"spread": True}),
        ("vertical_slash", {}),
        ("space_time", {}),
        ("space_time", {"sink": True, "every": 2}),
        ("stripe", {}),
        ("stripe", {"by": "anchor"}),
    ],
)
def test_selecting_never_waits_for_the_device(name, options):
    call = make_call((3, 6, 7), smooth=2)
    pattern = pattern_class(name).at_density(0.3, call.grid, call.segments, call.block, **options)
    first = selected(pattern, call)  # what hangs on shapes alone is made once and may wait
    again = replace(call, memory={})
    with NeverWaiting():
        second = selected(pattern, again)
    assert torch.equal(first.mask, second.mask)
    with NeverWaiting(), pytest.raises(AssertionError):
        first.mask.sum().item()


@pytest.mark.parametrize("name", ["grid", "vertical_slash", "space_time", "stripe"])
def test_text_changes_nothing_about_the_video(name):
    """What is kept of the video is what would be kept without text beside it."""
    segments = (Segment("text", 0, 21), Segment("video", 21, 126), Segment("pad", 147, 4), Segment("text", 151, 6))
    call = make_call((3, 6, 7), segments=segments, smooth=2)
    pattern = pattern_class(name).at_density(0.3, call.grid, segments, call.block)
    alone = make_call((3, 6, 7))
    alone = replace(alone, q=call.video_q, k=call.video_k, v=call.video_v)
    with_text, without = selected(pattern, call), selected(pattern, alone)
    assert torch.equal(with_text.mask, without.mask)
    assert torch.equal(with_text.queries.order, without.queries.order)
