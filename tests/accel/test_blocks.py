"""Orders of the video's tokens, and the blocks that they are cut into."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, block_means, blocks_in, places_in
from pointillist.accel.orders import AXES, ORDERS, order_of, places_of
from pointillist.accel.tiles import tile_count, tiles_of

CPU = torch.device("cpu")
LENGTH = st.integers(1, 9)
SMALL_GRIDS = st.tuples(LENGTH, LENGTH, LENGTH)


def random_grid(most=9):
    return tuple(random.randint(1, most) for _ in range(3))


def tokens_of(grid):
    """(t, h, w) of every token in the sequence's order."""
    return list(itertools.product(*map(range, grid)))


def tiles_with_places(grid, block):
    """The places of every tile's tokens, [n, 3] each; and how many tiles the first frame has."""
    order, bounds, first_frame = tiles_of(grid, block)
    return list(places_of(grid)[order].split(bounds.diff().tolist())), first_frame


@settings(deadline=None, max_examples=60)
@given(SMALL_GRIDS, st.integers(1, 70))
def test_tiles_partition_the_video_evenly(grid, block):
    order, bounds, first_frame = tiles_of(grid, block)
    assert order.sort().values.tolist() == list(range(math.prod(grid)))
    sizes = bounds.diff().tolist()
    assert len(sizes) == tile_count(grid, block) and max(sizes) <= block and int(bounds[0]) == 0
    for part in (sizes[:first_frame], sizes[first_frame:]):
        assert not part or max(part) - min(part) <= 1
    for start, stop in itertools.pairwise(bounds.tolist()):
        assert order[start:stop].tolist() == sorted(order[start:stop].tolist())


@settings(deadline=None, max_examples=40)
@given(SMALL_GRIDS, st.integers(1, 70))
def test_the_first_latent_frame_has_tiles_of_its_own(grid, block):
    order, bounds, first_frame = tiles_of(grid, block)
    frame = grid[1] * grid[2]
    if grid[0] == 1:
        assert first_frame == 0
    else:
        assert int(bounds[first_frame]) == frame and set(order[:frame].tolist()) == set(range(frame))


def test_tiles_of_a_cube_are_cubes():
    """The video behind its first frame, 8 × 8 × 8, in cells of 64."""
    tiles, first_frame = tiles_with_places((9, 8, 8), 64)
    assert first_frame == 1 and len(tiles) == 9
    for places in tiles[first_frame:]:
        assert (places.amax(0) - places.amin(0)).tolist() == [3, 3, 3]
        assert ((places.amin(0) - torch.tensor([1, 0, 0])) % 4 == 0).all()


def test_tiles_of_a_video_are_near_cubic():
    tiles, first_frame = tiles_with_places((9, 22, 22), 64)
    for places in tiles[first_frame:]:
        assert int((places.amax(0) - places.amin(0)).max()) + 1 <= 6
    for places in tiles[:first_frame]:
        assert int((places.amax(0) - places.amin(0)).max()) + 1 <= 11


@pytest.mark.parametrize(
    ("grid", "first", "others"),
    [
        ((21, 45, 80), (30, 120), (576, 125)),
        ((33, 45, 80), (30, 120), (900, 128)),
        ((21, 30, 52), (13, 120), (260, 120)),
    ],
)
def test_tiles_fit_real_videos_without_padding(grid, first, others):
    """Tiles of at most 128 tokens: how many, and how large, in the first frame and behind it. None is smaller."""
    order, bounds, first_frame = tiles_of(grid, 128)
    sizes = bounds.diff().tolist()
    assert order.unique().numel() == bounds[-1] == math.prod(grid)
    assert sizes == [first[1]] * first[0] + [others[1]] * others[0] and first_frame == first[0]
    assert first[0] * first[1] == grid[1] * grid[2]


@settings(deadline=None, max_examples=40)
@given(SMALL_GRIDS, st.integers(1, 40))
def test_frames_blocks_lie_within_a_frame_and_are_alike_in_all(grid, block):
    blocks, frame = blocks_in("frames", grid, block, CPU), grid[1] * grid[2]
    order, bounds = blocks.order[0, 0], blocks.bounds[0, 0].tolist()
    cut = [order[start:stop].tolist() for start, stop in itertools.pairwise(bounds)]
    assert all(len({token // frame for token in tokens}) == 1 for tokens in cut)
    per_frame = len(cut) // grid[0]
    for index, tokens in enumerate(cut):
        assert [token - index // per_frame * frame for token in tokens] == cut[index % per_frame]


@pytest.mark.parametrize("name", ORDERS)
@settings(deadline=None, max_examples=40)
@given(grid=SMALL_GRIDS)
def test_orders_are_permutations(name, grid):
    assert order_of(name, grid).sort().values.tolist() == list(range(math.prod(grid)))


@pytest.mark.parametrize("name", AXES)
def test_axis_orders_sort_by_their_letters(name):
    grid = random_grid()
    tokens = tokens_of(grid)
    expected = sorted(tokens, key=lambda token: [token["thw".index(axis)] for axis in name])
    assert [tokens[i] for i in order_of(name, grid).tolist()] == expected


def test_morton_interleaves_bits():
    grid = random_grid(12)
    tokens = tokens_of(grid)

    def key(token):
        digits = zip(*(f"{axis:08b}" for axis in token), strict=True)
        return int("".join(itertools.chain.from_iterable(digits)), 2)

    assert [tokens[i] for i in order_of("morton", grid).tolist()] == sorted(tokens, key=key)


def steps_of(name, grid):
    """How far each token is from the one before, on every axis."""
    return places_of(grid)[order_of(name, grid)].diff(dim=0).abs()


@pytest.mark.parametrize("length", [2, 4, 8, 16])
def test_hilbert_goes_from_neighbour_to_neighbour_in_a_cube(length):
    assert (steps_of("hilbert", (length,) * 3).sum(1) == 1).all()


@pytest.mark.parametrize("length", [4, 8])
def test_hilbert_fills_each_octant_before_the_next(length):
    """What makes it more than any path: every aligned eighth of the cube is one run."""
    places = places_of((length,) * 3)[order_of("hilbert", (length,) * 3)]
    octants = (places // (length // 2)).view(8, -1, 3)
    assert (octants == octants[:, :1]).all()


@settings(deadline=None, max_examples=150)
@given(st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 14)))
def test_gilbert_goes_from_neighbour_to_neighbour(grid):
    """Or to a diagonal one within a plane, where sizes are odd."""
    steps = steps_of("gilbert", grid)
    assert not len(steps) or (int(steps.max()) == 1 and int(steps.sum(1).max()) <= 2)


@pytest.mark.parametrize("grid", [(2, 4, 6), (4, 8, 8), (6, 10, 14), (22, 22, 8)])
def test_gilbert_has_no_diagonal_steps_where_all_sizes_are_even(grid):
    assert (steps_of("gilbert", grid).sum(1) == 1).all()


@pytest.mark.parametrize("order", BLOCK_ORDERS)
def test_blocks_cover_every_token_once(order):
    for _ in range(4):
        grid, block = random_grid(), random.randint(1, 50)
        blocks = blocks_in(order, grid, block, CPU)
        bounds, tokens = blocks.bounds[0, 0], math.prod(grid)
        assert blocks.order.shape == (1, 1, tokens) and blocks.order.sort().values.flatten().equal(torch.arange(tokens))
        assert int(bounds[0]) == 0 and int(bounds[-1]) == tokens and bounds.diff().min() > 0
        assert int(bounds.diff().max()) == blocks.largest <= block
        assert blocks.count == len(bounds) - 1 and blocks.sizes[0, 0].tolist() == bounds.diff().tolist()
        assert blocks.name == order
        assert places_in(order, grid, block, CPU)[blocks.order[0, 0]].equal(torch.arange(tokens))
        assert blocks.uniform == (order in ORDERS)
        if blocks.uniform:
            assert (bounds.diff()[:-1] == blocks.largest).all()
        if blocks.first_frame:
            frame = grid[1] * grid[2]
            first = blocks.order[0, 0, : int(bounds[blocks.first_frame])]
            assert sorted(first.tolist()) == list(range(frame))
        holds = blocks.block_of_token()[0, 0].tolist()
        for place, token in enumerate(blocks.order[0, 0].tolist()):
            assert int(bounds[holds[token]]) <= place < int(bounds[holds[token] + 1])


def plain_means(x, blocks):
    """Means with loops over batch entries, heads and blocks; nothing for blocks that are empty."""
    batch, heads = x.shape[:2]
    order, bounds = (each.expand(batch, heads, -1) for each in (blocks.order, blocks.bounds))
    means = torch.full((batch, heads, blocks.count, x.shape[3]), math.nan, dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(blocks.count)):
        tokens = order[b, h, bounds[b, h, i] : bounds[b, h, i + 1]]
        if len(tokens):
            means[b, h, i] = x[b, h, tokens].double().mean(0)
    return means


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["tiles", "frames", "hwt", "gilbert"])
def test_block_means_are_plain_means(order, dtype):
    grid = random_grid()
    x = torch.randn(2, 3, math.prod(grid), 5).to(dtype)
    blocks = blocks_in(order, grid, random.randint(1, 20), CPU)
    means = block_means(x, blocks)
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(means.double(), plain_means(x, blocks), rtol=1e-4, atol=1e-5)


def test_block_means_with_blocks_of_each_head_are_plain_means():
    batch, heads, tokens, count = 2, 3, random.randint(20, 60), 5
    order = torch.stack([torch.randperm(tokens) for _ in range(batch * heads)]).view(batch, heads, tokens)
    inner = torch.stack([torch.randperm(tokens - 1)[: count - 1].sort().values + 1 for _ in range(batch * heads)])
    bounds = torch.nn.functional.pad(inner, (1, 0))
    bounds = torch.nn.functional.pad(bounds, (0, 1), value=tokens).view(batch, heads, count + 1).int()
    x = torch.randn(batch, heads, tokens, 5)
    for blocks in (
        Blocks(order, bounds, tokens),
        Blocks(order[:, :1], bounds, tokens),
        Blocks(order[:1], bounds[:1, :1], tokens),
    ):
        torch.testing.assert_close(block_means(x, blocks).double(), plain_means(x, blocks), rtol=1e-4, atol=1e-5)
