"""What holds for every pattern, whatever it looks at."""

import subprocess
import sys
from dataclasses import replace

import imageio.v3 as iio
import pytest
import torch

from pattern_checks import GRIDS, laid_out, make_call, selected, video_mask
from pointillist.accel.layouts import Group, lay_out, select, sub_call
from pointillist.accel.patterns import PATTERNS, pattern_class
from pointillist.accel.patterns.pattern import without_padding
from pointillist.accel.tails import attend
from pointillist.accel.tiles import Segment, whole_video

SPARSE = [name for name in PATTERNS if name not in ("dense", "skip")]
TEXT_EVERYWHERE = (
    Segment("text", 0, 21), Segment("video", 21, 210), Segment("condition", 231, 7), Segment("pad", 238, 9),
)  # fmt: skip


def pattern_of(name, density, grid, block=16, segments=None):
    return pattern_class(name).at_density(density, grid, segments or whole_video(grid), block)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_density_is_the_one_asked_for(name, grid):
    for density in (0.15, 0.4):
        call = make_call(grid, smooth=2)
        pattern = pattern_of(name, density, grid)
        pattern.prepare(sub_call(Group(pattern), call), call.q)
        selection = selected(pattern, call)
        laid = laid_out(pattern, call)
        largest = selection.keys.sizes.max() / selection.keys.order.shape[-1]
        assert abs(float(laid.density) - density) <= max(0.03, float(largest)), (float(laid.density), density)
        kept = video_mask(laid, call)
        assert float(laid.density) == pytest.approx(float(kept.float().mean()), abs=1e-5)
        assert int(selection.mask.sum()) <= selection.pairs


@pytest.mark.parametrize("name", [name for name in PATTERNS if name not in ("skip", "semantic")])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_sees_itself(name, grid):
    """In `semantic`, whose blocks of queries and keys differ, that would cost up to a third of all pairs."""
    call = make_call(grid)
    for density in (0.01, 0.3):
        kept = video_mask(laid_out(pattern_of(name, density, grid), call), call)
        assert kept.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "skip"])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_sees_something(name, grid):
    call = make_call(grid)
    for density in (0.01, 0.3):
        assert video_mask(laid_out(pattern_of(name, density, grid), call), call).any(-1).all()


@pytest.mark.parametrize("name", PATTERNS)
def test_segments_beside_the_video_are_exact(name):
    """Text before and after the video: it sees everything and is seen by everything; padding is seen by nobody."""
    grid, block = (5, 6, 7), 16
    call = make_call(grid, segments=TEXT_EVERYWHERE, smooth=2)
    pattern = pattern_of(name, 0.2, grid, block, TEXT_EVERYWHERE)
    laid = laid_out(pattern, call)
    kept = laid.layout.token_mask(2, 3)
    rows, columns = torch.zeros(247, dtype=torch.bool), torch.zeros(238, dtype=torch.bool)
    rows[21:231] = columns[21:231] = True
    assert kept.shape[2:] == (247, 238)
    assert kept[:, :, ~rows].all() and kept[:, :, :, ~columns].all()
    assert name == "dense" or not kept[:, :, rows][..., columns].all()
    alone = replace(
        make_call(grid), q=call.video_q, k=call.video_k, v=call.video_v, memory={}, segments=whole_video(grid)
    )
    if name not in ("masses", "reorder"):  # whose exact masses count what the text takes
        assert torch.equal(kept[:, :, rows][..., columns], laid_out(pattern, alone).layout.token_mask(2, 3))


def test_padding_is_taken_out_of_the_keys():
    segments = (Segment("text", 0, 3), Segment("pad", 3, 5), Segment("video", 8, 6), Segment("condition", 14, 2))
    assert without_padding(segments) == (Segment("text", 0, 3), Segment("video", 3, 6), Segment("condition", 9, 2))


@pytest.mark.parametrize("name", SPARSE)
def test_batch_entries_do_not_touch_each_other(name):
    """Every entry of a batch gets what it would get alone."""
    grid = (3, 6, 7)
    call = make_call(grid, batch=2, smooth=2)
    pattern = pattern_of(name, 0.3, grid)
    together = video_mask(laid_out(pattern, call), call)
    for entry in range(2):
        one = slice(entry, entry + 1)
        alone = replace(call, q=call.q[one], k=call.k[one], v=call.v[one], memory={})
        assert torch.equal(together[one], video_mask(laid_out(pattern, alone), alone))


@pytest.mark.parametrize("name", SPARSE)
def test_selection_is_repeatable_and_leaves_the_global_generator_alone(name):
    call = make_call((3, 6, 7), smooth=2)
    pattern = pattern_of(name, 0.3, call.grid)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = video_mask(laid_out(pattern, call), call)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, video_mask(laid_out(pattern, replace(call, memory={})), call))


@pytest.mark.parametrize("tail", ["none", "pooled", "rectified", "rescaled"])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_computes_with_every_tail(name, tail):
    """Finite, and near to dense attention where q and k are flat: then any pattern averages values."""
    grid = (3, 6, 7)
    call = make_call(grid, segments=(Segment("video", 0, 126), Segment("text", 126, 9)))
    pattern = pattern_of(name, 0.3, grid, segments=call.segments)
    laid = laid_out(pattern, call)
    out = attend(call, laid, tail)
    out = pattern.finish(sub_call(Group(pattern), call), out)
    assert out.shape == call.q.shape and out.isfinite().all()
    flat = replace(call, q=torch.zeros_like(call.q), k=torch.zeros_like(call.k), v=torch.ones_like(call.v), memory={})
    if name != "skip":
        out = attend(flat, laid_out(pattern, flat), tail)
        torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("name", SPARSE)
def test_heads_with_different_patterns_share_a_launch(name):
    """A head beside heads of other patterns, orders and block counts keeps what it keeps alone."""
    grid = (5, 6, 7)
    call = make_call(grid, smooth=2)
    groups = [
        Group(pattern_of("pooled", 0.5, grid), (0,)),
        Group(pattern_of(name, 0.25, grid), (1, 2)),
    ]
    if name == "pooled":
        groups[0] = Group(pattern_of("window", 0.5, grid), (0,))
    parts = [(group, select(group, call)) for group in groups]
    for dense_first_frame in (False, True):
        laid = lay_out(parts, call, dense_first_frame)
        together = laid.layout.token_mask(2, 3)
        for group, part in parts:
            chosen = list(group.heads)
            own = replace(call, q=call.q[:, chosen], k=call.k[:, chosen], v=call.v[:, chosen])
            alone = lay_out([(Group(group.pattern), part)], own, dense_first_frame).layout.token_mask(2, len(chosen))
            assert torch.equal(together[:, chosen], alone)
        assert float(laid.density) == pytest.approx(float(together.float().mean()), abs=1e-5)
        assert laid.layout.indptr[..., -1].max() <= laid.layout.columns.numel()


@pytest.mark.parametrize("name", SPARSE)
def test_a_dense_first_frame_sees_everything(name):
    grid = (5, 6, 7)
    call = make_call(grid, smooth=2)
    pattern = pattern_of(name, 0.2, grid)
    part = selected(pattern, call)
    plain, dense = (lay_out([(Group(pattern), part)], call, first) for first in (False, True))
    kept, before = video_mask(dense, call), video_mask(plain, call)
    assert kept[:, :, :42].all() and not before[:, :, :42].all()
    assert torch.equal(kept[:, :, 42:], before[:, :, 42:])
    assert float(dense.density) == pytest.approx(float(kept.float().mean()), abs=1e-5)


@pytest.mark.parametrize("name", PATTERNS)
def test_unknown_options_are_refused(name):
    with pytest.raises(ValueError, match="no option 'colour'"):
        pattern_class(name).at_density(0.3, (3, 4, 5), colour=3)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_draws_itself(name, tmp_path):
    command = [sys.executable, "-m", f"pointillist.accel.patterns.{name}", "--grid", "3", "8", "8", "--block", "16"]
    done = subprocess.run([*command, "--out", str(tmp_path / "drawn.png")], capture_output=True, check=True, text=True)
    assert "density" in done.stdout and "Warning" not in done.stderr
    assert iio.imread(tmp_path / "drawn.png").std() > 5
