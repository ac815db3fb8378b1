"""`tile` against frames that are listed one by one."""

import random

import pytest
import torch

from pattern_checks import assert_covers, laid_out, make_call, selected, video_mask
from pointillist.accel.patterns.tile import Tile


def around(query, length, share):
    """The places on an axis that a window of a share of it holds, moved inwards at the border."""
    width = max(1, round(share * length))
    first = min(max(query - width // 2, 0), length - width)
    return range(first, first + width)


def frames_seen(grid, window, references, offset=0):
    """bool [1, 1, N, N]: reference frames, the nearest others, and a part of the next one."""
    frames, height, width = grid
    chosen = {(offset + i * frames // references) % frames for i in range(references)}
    whole = int(window)
    wanted = torch.zeros(*grid, *grid, dtype=torch.bool)
    for t in range(frames):
        others = sorted(set(range(frames)) - chosen, key=lambda u: (abs(t - u), u))
        for u in (*chosen, *others[:whole]):
            wanted[t, :, :, u] = True
        for u in others[whole : whole + 1] if window > whole else ():
            for h in range(height):
                for w in range(width):
                    rows, columns = around(h, height, window - whole), around(w, width, window - whole)
                    wanted[t, h, w, u, rows.start : rows.stop, columns.start : columns.stop] = True
    return wanted.view(1, 1, frames * height * width, -1)


@pytest.mark.parametrize("references", [0, 1, 2, 3])
@pytest.mark.parametrize("grid", [(7, 4, 5), (1, 9, 7), (4, 6, 6)])
def test_frames_are_those_listed(grid, references):
    references = min(references, grid[0])
    for window in (random.uniform(0.05, 0.95), float(random.randint(1, 3)), random.uniform(1, grid[0])):
        offset = random.randint(0, 20)
        pattern = Tile(window, references, offset=offset)
        wanted = frames_seen(grid, window, references, offset)
        assert_covers(pattern, make_call(grid, block=random.randint(2, 9)), wanted)


@pytest.mark.parametrize("frames", [6, 12])
def test_every_query_sees_equally_many_frames_however_long_the_video(frames):
    """At the border the window moves inwards; with the counts fixed, the cost grows linearly."""
    call = make_call((frames, 3, 4), batch=1, heads=1, block=4)
    kept = video_mask(laid_out(Tile(3.0, 2), call), call)[0, 0]
    assert set(kept.sum(1).tolist()) == {5 * 12}
    assert kept[0].view(frames, 12).any(1).nonzero().flatten().tolist() == sorted({0, 1, 2, 3, frames // 2} | (
        {4} if frames == 6 else set()
    ))  # fmt: skip


def test_the_share_of_references_is_chosen():
    for share, (window, references) in {0.0: (8, 1), 1 / 3: (6, 3), 0.8: (2, 7), 1.0: (0, 9)}.items():
        found = Tile.at_density(9.01 / 33, (33, 8, 8), block=64, share=share)
        assert (int(found.window), found.references) == (window, references)
    assert Tile.at_density(9.01 / 33, (33, 8, 8), block=64) == Tile.at_density(
        9.01 / 33, (33, 8, 8), share=1 / 3, block=64
    )
    with pytest.raises(ValueError, match=r"share"):
        Tile.check_values({"share": 1.5})


@pytest.mark.parametrize("frames", [1, 2, 5, 9, 33])
def test_references_at_both_ends_and_between(frames):
    for references in range(1, frames + 1):
        nearer = Tile(1.0, references, ends=True)._nearer(frames)
        chosen = (nearer[0] == -1).nonzero().flatten().tolist()
        assert len(chosen) == references and chosen[: min(2, references)] == [0, 1][: min(2, references)]
        if references > 2:
            between = torch.tensor(chosen[1:]).diff()
            assert chosen[-1] == frames - 1 and int(between.max() - between.min()) <= 1
    with pytest.raises(ValueError, match="leave out rotate"):
        Tile(1.0, 3, ends=True, rotate=True)


@pytest.mark.parametrize("grid", [(7, 9, 10), (4, 12, 14), (1, 25, 31)])
def test_any_density_is_reached(grid):
    call = make_call(grid, batch=1, heads=1, dim=1, block=32)
    for density in (0.02, *(random.uniform(0.03, 1) for _ in range(2)), 1.0):
        pattern = Tile.at_density(density, grid, block=32)
        laid = laid_out(pattern, call)
        a_block = 32 / (grid[0] * grid[1] * grid[2])
        assert float(laid.density) == pytest.approx(density, abs=max(0.03, a_block)), (density, pattern)


def test_references_are_at_most_a_third_but_one_when_two_frames_fit():
    assert [Tile.at_density(frames / 24, (24, 4, 4), block=4).references for frames in (1, 2, 3, 6, 11, 12)] == [
        0, 1, 1, 2, 3, 4,
    ]  # fmt: skip
    assert Tile.at_density(1.5 / 24, (24, 8, 8), block=4).references == 0


def test_below_a_frame_a_query_sees_a_part_of_its_own():
    call = make_call((5, 12, 12), batch=1, heads=1, block=9)
    pattern = Tile.at_density(0.08, call.grid, block=9)
    kept = video_mask(laid_out(pattern, call), call)[0, 0].view(5, 144, 5, 144)
    assert all(not kept[t, :, u].any() for t in range(5) for u in range(5) if t != u)
    assert not kept[2, :, 2].all()


def test_references_rotate_with_the_step():
    grid = (6, 3, 4)
    call = make_call(grid, batch=1, heads=1, block=4)
    pattern = Tile(1.0, 2, rotate=True)
    assert pattern.at_step(3, call.grid) == pattern.at_step(3, call.grid)
    for step in range(7):
        expected = frames_seen(grid, 1.0, 2, step)
        assert_covers(pattern.at_step(step, call.grid), call, expected)
    masks = [selected(pattern.at_step(step, call.grid), call).mask for step in range(3)]
    assert not torch.equal(masks[0], masks[1])
    seen = torch.stack(masks).any(0)
    assert seen.all(), "in as many steps as there are frames between references, every frame has been one"
    still = Tile(1.0, 2)
    assert still.at_step(5, call.grid) is still


@pytest.mark.parametrize("wrong", [{"offset": -1}, {"rotate": 1}])
def test_values_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"allowed|must be"):
        Tile.at_density(0.3, (3, 4, 5), **wrong)
