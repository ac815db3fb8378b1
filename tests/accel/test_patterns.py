"""Tiles and patterns on grids of all sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist.accel.patterns import PATTERNS
from pointillist.accel.tiles import tiles_of

grids = st.tuples(st.integers(1, 13), st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=60, deadline=None)
@given(grids, st.sampled_from([16, 64, 128]))
def test_tiles_partition_the_grid(grid, block):
    tiles = tiles_of(grid, block)
    assert torch.equal(tiles.order[0, 0].sort().values, torch.arange(grid[0] * grid[1] * grid[2]))
    sizes = tiles.bounds.diff()
    assert sizes.min() >= 1 and sizes.max() == tiles.largest <= block
    for start, stop, centre in zip(tiles.bounds, tiles.bounds[1:], tiles.centres, strict=False):
        token = tiles.order[0, 0, start:stop]
        place = torch.stack([token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]]).double()
        extent = place.amax(1) - place.amin(1) + 1
        assert extent.prod() == stop - start  # a box
        torch.testing.assert_close(place.mean(1), centre.double())


@settings(max_examples=60, deadline=None)
@given(grids, st.floats(0.02, 1), st.sampled_from(["window", "pooled"]))
def test_density_is_realised(grid, density, name):
    tiles = tiles_of(grid, 64)
    pattern = PATTERNS[name].at_density(density, tiles)
    q, k = torch.randn(2, 3, tiles.tokens, 8), torch.randn(2, 3, tiles.tokens, 8)
    mask = pattern.mask(q, k, tiles)
    kept = mask.sum(-1)
    assert (kept == kept.flatten()[0]).all()
    assert abs(kept.flatten()[0] / tiles.count - density) <= max(0.03, 1 / tiles.count)
    assert mask.diagonal(dim1=-2, dim2=-1).all()


def test_window_is_a_neighbourhood():
    tiles = tiles_of((9, 22, 22), 128)
    mask = PATTERNS["window"].at_density(0.2, tiles).mask(torch.zeros(1, 1, 1, 1), None, tiles)[0, 0]
    place = tiles.centres / torch.tensor(tiles.grid)
    distance = torch.cdist(place, place)
    for row, kept in zip(distance, mask, strict=True):
        assert row[kept].max() <= row[~kept].min() + 1e-4


def test_pooled_finds_the_block_that_holds_the_mass():
    tiles = tiles_of((4, 16, 16), 64)
    k = torch.randn(1, 2, tiles.tokens, 16) * 0.1
    q = torch.randn(1, 2, 1, 16).expand(1, 2, tiles.tokens, 16)
    start, stop = tiles.bounds[5], tiles.bounds[6]
    k[:, :, start:stop] += q[:, :, :1]
    mask = PATTERNS["pooled"](keep=2).mask(q, k, tiles)
    assert mask[..., 5].all()


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_draws_itself(name, tmp_path, monkeypatch):
    import imageio.v3 as iio

    from pointillist.accel.patterns.draw import draw

    monkeypatch.setattr("sys.argv", [name, "--grid", "5", "8", "8", "--block", "32", "--output", str(tmp_path / "p.png")])
    draw(PATTERNS[name])
    picture = iio.imread(tmp_path / "p.png")
    assert picture.shape[0] == picture.shape[1] == 8 * tiles_of((5, 8, 8), 32).count
