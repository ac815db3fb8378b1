"""Tilings and patterns on grids of all sizes."""

import math
from itertools import pairwise

import imageio.v3 as iio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist.accel.layouts import layout_of
from pointillist.accel.patterns import PATTERNS
from pointillist.accel.tiles import Segment, tile_count, tiling_of, whole_video

grids = st.tuples(st.integers(1, 13), st.integers(1, 24), st.integers(1, 24))
CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(grids, st.sampled_from([16, 64, 128]))
def test_tiles_partition_the_grid(grid, block):
    tiling = tiling_of(grid, whole_video(grid), block, CPU)
    assert torch.equal(tiling.order.sort().values, torch.arange(math.prod(grid)))
    assert tiling.tiles == tile_count(grid, block)
    sizes = tiling.bounds.diff()
    assert sizes.min() >= 1 and sizes.max() == tiling.largest <= block
    frame = tiling.order // (grid[1] * grid[2])
    alone = [bool((frame[a:b] == 0).all()) for a, b in pairwise(tiling.bounds.tolist())]
    for part in (sizes[torch.tensor(alone)], sizes[~torch.tensor(alone)]):
        assert part.numel() == 0 or part.max() - part.min() <= 1  # equally large
    assert int(sizes[torch.tensor(alone)].sum()) == grid[1] * grid[2]  # no tile mixes the first frame with others
    for i in range(tiling.tiles):
        token = tiling.order[tiling.bounds[i] : tiling.bounds[i + 1]]
        assert (tiling.block_of_token[token] == i).all()
        place = torch.stack([token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]]).double()
        torch.testing.assert_close(place.mean(1).float(), tiling.centres[i])


def test_tiles_are_near_cubic():
    """8×8×8 = 512 tokens in cells of 64 are cubes of 4; an odd grid's are at most half as long again."""
    for frames, side, longest in ((9, 8, 4), (9, 22, 6)):
        grid = (frames, side, side)
        tiling = tiling_of(grid, whole_video(grid), 64, CPU)
        for first, last in pairwise(tiling.bounds.tolist()):
            token = tiling.order[first:last]
            place = torch.stack([token // side**2, token // side % side, token % side])
            if place[0].min() > 0:
                assert (place.amax(1) - place.amin(1) + 1).max() <= longest


@settings(max_examples=60, deadline=None)
@given(grids, st.floats(0.02, 1), st.sampled_from(["window", "pooled"]))
def test_density_is_realised(grid, density, name):
    tiling = tiling_of(grid, whole_video(grid), 64, CPU)
    pattern = PATTERNS[name].at_density(density, grid, whole_video(grid), 64)
    q, k = torch.randn(2, tiling.tokens, 3, 8), torch.randn(2, tiling.tokens, 3, 8)
    layout, realised = layout_of((pattern,), q, k, tiling, 0.35)
    assert abs(float(realised) - density) <= max(0.03, tiling.largest / tiling.tokens)
    assert float(realised) == pytest.approx(layout.density(), abs=1e-6)
    scores = pattern.scores(q, k, tiling, 1.0)
    assert scores.shape[-2:] == (tiling.tiles, tiling.tiles)
    assert (scores.argmax(-1) == torch.arange(tiling.tiles)).all()  # a tile ranks itself first


def test_segments_beside_the_video_are_exact():
    """Text before and after the video: their tokens see everything and are seen by everything."""
    grid, block = (3, 5, 6), 16
    segments = (Segment("text", 0, 21), Segment("video", 21, 90), Segment("condition", 111, 7))
    tiling = tiling_of(grid, segments, block, CPU)
    assert torch.equal(tiling.order.sort().values, torch.arange(118))
    q, k = torch.randn(2, 118, 3, 8), torch.randn(2, 118, 3, 8)
    mixed = tuple(PATTERNS["pooled"](keep=keep) for keep in (1, 2, 3))
    kept = layout_of(mixed, q, k, tiling, 0.35)[0].token_mask(2, 3)
    video = torch.zeros(118, dtype=torch.bool)
    video[21:111] = True
    assert kept[:, :, ~video].all() and kept[:, :, :, ~video].all()
    assert not kept[:, :, video][..., video].all()
    alone = layout_of(mixed, q[:, video], k[:, video], tiling_of(grid, whole_video(grid), block, CPU), 0.35)[0]
    assert torch.equal(kept[:, :, video][..., video], alone.token_mask(2, 3))


def test_a_dense_first_frame_sees_everything():
    grid, q, k = (4, 6, 7), torch.randn(2, 168, 3, 8), torch.randn(2, 168, 3, 8)
    tiling = tiling_of(grid, whole_video(grid), 16, CPU)
    mixed = tuple(PATTERNS["pooled"](keep=keep) for keep in (1, 2, 3))
    plain, _ = layout_of(mixed, q, k, tiling, 0.35)
    layout, density = layout_of(mixed, q, k, tiling, 0.35, dense_first_frame=True)
    kept, before = layout.token_mask(2, 3), plain.token_mask(2, 3)
    assert kept[:, :, :42].all() and not before[:, :, :42].all()
    assert torch.equal(kept[:, :, 42:], before[:, :, 42:])
    assert float(density) == pytest.approx(layout.density(), abs=1e-6)
    image = tiling_of((1, 6, 7), whole_video((1, 6, 7)), 16, CPU)
    assert not layout_of(mixed, q[:, :42], k[:, :42], image, 0.35, dense_first_frame=True)[0].mask().all()


def test_pooled_finds_the_block_that_holds_the_mass():
    tiling = tiling_of((4, 16, 16), whole_video((4, 16, 16)), 64, CPU)
    q = torch.randn(1, 1, 2, 16).expand(1, tiling.tokens, 2, 16)
    k = torch.randn(1, tiling.tokens, 2, 16) * 0.1
    k[:, tiling.block_of_token == 5] += q[:, :1]
    ranks = PATTERNS["pooled"](keep=2).scores(q, k, tiling, 1.0).topk(2).indices
    assert (ranks == 5).any(-1).all()


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_draws_itself(name, tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-m", f"pointillist.accel.patterns.{name}", "--grid", "3", "8", "8", "--block", "16"]
    subprocess.run([*command, "--output", str(tmp_path / "drawn.png")], capture_output=True, check=True)
    drawn = iio.imread(tmp_path / "drawn.png")
    assert drawn.any() and (drawn.mean() == 255) == (name == "dense")
