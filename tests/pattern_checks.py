"""What the tests of patterns share: calls to select for, and layouts as token masks."""

import torch

from pointillist.accel.blocks import Blocks
from pointillist.accel.layouts import Group, Laid, lay_out, select
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, video_of, without_padding
from pointillist.accel.tiles import Grid, Segment, whole_video

GRIDS: tuple[Grid, ...] = ((5, 6, 7), (3, 9, 4), (1, 11, 13), (7, 3, 5), (2, 8, 8))
"""Odd sizes, an image, and one that blocks of 16 divide."""


def make_call(
    grid: Grid,
    *,
    batch: int = 2,
    heads: int = 3,
    dim: int = 16,
    block: int = 16,
    segments: tuple[Segment, ...] | None = None,
    seed: int | None = None,
    smooth: float = 0.0,
    **others,
) -> Call:
    """A call with fresh random q, k, v; `smooth` adds waves over the grid, so that neighbours are alike."""
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    segments = whole_video(grid) if segments is None else segments
    q_len = sum(each.length for each in segments)
    k_len = sum(each.length for each in without_padding(segments))
    q, k, v = (torch.randn(batch, heads, n, dim, generator=generator) for n in (q_len, k_len, k_len))
    if smooth:
        axes = (torch.linspace(-1, 1, length) for length in grid)
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
        waves = (3 * place @ torch.randn(batch, heads, 3, dim, generator=generator)).cos() * smooth
        for x, each in ((q, segments), (k, without_padding(segments))):
            video = video_of(each)
            x[:, :, video.start : video.stop] += waves
    return Call(q, k, v, dim**-0.5, grid, segments, block, **others)


def selected(pattern: Pattern, call: Call) -> Selection:
    return select(Group(pattern), call)


def laid_out(pattern: Pattern, call: Call, **options) -> Laid:
    return lay_out([(Group(pattern), selected(pattern, call))], call, **options)


def video_mask(laid: Laid, call: Call) -> torch.Tensor:
    """bool [B, H, N, N]: which video token sees which in a layout."""
    kept = laid.layout.token_mask(*call.q.shape[:2])
    rows, columns = video_of(call.segments), video_of(without_padding(call.segments))
    return kept[:, :, rows.start : rows.stop, columns.start : columns.stop]


def covered(wanted: torch.Tensor, queries: Blocks, keys: Blocks) -> torch.Tensor:
    """bool [B, H, nq, nk]: the block pairs that hold a token pair of `wanted`, bool [B, H, N, N]. Plain loops."""
    batch, heads = wanted.shape[:2]
    q_order, k_order = (each.order.expand(batch, heads, -1) for each in (queries, keys))
    q_bounds, k_bounds = (each.bounds.expand(batch, heads, -1).tolist() for each in (queries, keys))
    mask = torch.zeros(batch, heads, queries.count, keys.count, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            places = wanted[b, h][q_order[b, h]][:, k_order[b, h]]
            for i in range(queries.count):
                rows = places[q_bounds[b][h][i] : q_bounds[b][h][i + 1]]
                for j in range(keys.count):
                    mask[b, h, i, j] = rows[:, k_bounds[b][h][j] : k_bounds[b][h][j + 1]].any()
    return mask


def assert_covers(pattern: Pattern, call: Call, wanted: torch.Tensor) -> None:
    """The pattern keeps exactly the block pairs that hold a wanted token pair; `wanted` is bool [B|1, H|1, N, N]."""
    batch, heads = call.q.shape[:2]
    wanted = wanted.expand(batch, heads, -1, -1)
    selection = selected(pattern, call)
    expected = covered(wanted, selection.queries, selection.keys)
    assert torch.equal(selection.mask.expand(batch, heads, -1, -1), expected)
    assert int(selection.mask.sum()) <= selection.pairs
    assert bool((video_mask(laid_out(pattern, call), call) | ~wanted).all())
