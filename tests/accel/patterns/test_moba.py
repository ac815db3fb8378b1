"""VMoBA: partitions in turn, gates of query blocks, and what block selection costs against token selection."""

import itertools

import pytest
import torch

from pattern_checks import laid_out, make_call, selected, video_mask
from pointillist.accel.patterns.moba import Moba

GRIDS = [(5, 6, 7), (3, 9, 4), (7, 3, 5), (1, 11, 13)]


def listed(blocks):
    """The tokens of every block."""
    order, bounds = blocks.order[0, 0].tolist(), blocks.bounds[0, 0].tolist()
    return [order[start:stop] for start, stop in itertools.pairwise(bounds)]


def gates_of(call, tokens, chunks):
    """q·(mean of the chunk's keys)/√D of every token, averaged over `tokens`: float [B, H, chunks]."""
    means = torch.stack([call.video_k[:, :, chunk].mean(2) for chunk in chunks], 2)
    return torch.stack([(call.video_q[:, :, t, None] * means).sum(-1) for t in tokens]).mean(0) * call.scale


def extents(grid, tokens):
    """The coordinates that some tokens take on each axis."""
    _, height, width = grid
    places = [(t // (height * width), t // width % height, t % width) for t in tokens]
    return [sorted(set(axis)) for axis in zip(*places, strict=True)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("layer", "kind"), [(0, "frames"), (1, "columns"), (2, "boxes"), (3, "frames"), (7, "columns")]
)
def test_chunks_are_boxes_of_the_layers_kind(grid, layer, kind):
    """Every chunk is a full box of neighbours: whole frames, or all of time, or cut along every axis."""
    call = make_call(grid, layer=layer)
    selection = selected(Moba(0.3, chunk=2), call)
    chunks, pieces = listed(selection.keys), listed(selection.queries)
    everything = list(range(grid[0] * grid[1] * grid[2]))
    assert sorted(itertools.chain(*chunks)) == everything and sorted(itertools.chain(*pieces)) == everything
    for chunk in chunks:
        t, h, w = extents(grid, chunk)
        assert len(chunk) == len(t) * len(h) * len(w)
        assert all(axis == list(range(axis[0], axis[-1] + 1)) for axis in (t, h, w))
        whole = [len(axis) == length for axis, length in zip((t, h, w), grid, strict=True)]
        wanted = {"frames": (False, True, True), "columns": (True, False, False), "boxes": (False, False, False)}[kind]
        assert whole == [want or length == 1 for want, length in zip(wanted, grid, strict=True)]
    for piece in pieces:
        assert 0 < len(piece) <= 16 and sum(set(piece) <= set(chunk) for chunk in chunks) == 1


def test_chunks_have_about_the_asked_size():
    """In a video large enough for the three kinds: within a third of chunk × block, frames in whole ones."""
    call = make_call((12, 24, 24), batch=1, heads=1, dim=2, block=16)
    for partition, tokens in (("frames", 24 * 24), ("columns", 8 * 16), ("boxes", 8 * 16)):
        chunks = listed(selected(Moba(0.3, chunk=8, partition=partition), call).keys)
        mean = 12 * 24 * 24 / len(chunks)
        assert tokens / 1.34 < mean < tokens * 1.34, (partition, mean)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("partition", ["frames", "columns", "boxes"])
@pytest.mark.parametrize("rule", ["row", "head", "mass"])
def test_query_blocks_keep_their_own_chunk_and_those_of_the_highest_gates(grid, partition, rule):
    density, call = 0.5, make_call(grid, smooth=2)
    pattern = Moba(density, rule=rule, chunk=2, partition=partition)
    selection = selected(pattern, call)
    chunks, pieces = listed(selection.keys), listed(selection.queries)
    own = [next(j for j, chunk in enumerate(chunks) if piece[0] in chunk) for piece in pieces]
    gates = torch.stack([gates_of(call, piece, chunks) for piece in pieces], 2)
    for b, h in itertools.product(range(2), range(3)):
        kept = kept_by(rule, gates[b, h].tolist(), own, pieces, chunks, density)
        found = {(i, j) for i, j in selection.mask[b, h].nonzero().tolist()}
        assert found == kept
    assert int(selection.mask.sum()) <= selection.pairs
    assert bool(video_mask(laid_out(pattern, call), call).diagonal(dim1=-2, dim2=-1).all())


def kept_by(rule, gates, own, pieces, chunks, density):
    """The pairs that a rule keeps of one head, with lists and sorting."""
    rows, columns = range(len(pieces)), range(len(chunks))
    if rule == "row":
        count = max(1, round(density * len(chunks)))
        ranked = [sorted(columns, key=lambda j, i=i: (j != own[i], -gates[i][j]))[:count] for i in rows]
        return {(i, j) for i in rows for j in ranked[i]}
    exact = torch.tensor(gates, dtype=torch.float64)
    masses = exact.exp() * torch.tensor([len(chunk) for chunk in chunks])
    masses = (masses / masses.sum(-1, keepdim=True)).tolist()
    place = {}
    for i in rows:
        before = 0.0
        for j in sorted(columns, key=lambda j, i=i: (j != own[i], -gates[i][j])):
            by_mass = -1.0 if j == own[i] else before
            place[i, j] = by_mass if rule == "mass" else (-2.0 if j == own[i] else -masses[i][j])
            before += masses[i][j]
    budget = density * sum(map(len, pieces)) * sum(map(len, chunks))
    kept, spent = {(i, own[i]) for i in rows}, 0
    for i, j in sorted(place, key=place.__getitem__):
        area = len(pieces[i]) * len(chunks[j])
        if spent + area / 2 <= budget:
            kept.add((i, j))
        spent += area
    return kept


@pytest.mark.parametrize("partition", ["frames", "columns", "boxes"])
def test_inefficiency_is_the_union_of_what_tokens_choose_over_their_choices(partition):
    call = make_call((5, 6, 7), batch=1, heads=2, smooth=2)
    pattern = Moba(0.4, rule="row", chunk=2, partition=partition)
    selection = selected(pattern, call)
    chunks, pieces = listed(selection.keys), listed(selection.queries)
    count, alone, together = max(1, round(0.4 * len(chunks))), 0, 0
    for head, piece in itertools.product(range(2), pieces):
        union = set()
        for token in piece:
            gates = gates_of(call, [token], chunks)[0, head].tolist()
            ranked = sorted(range(len(chunks)), key=lambda j: (token not in chunks[j], -gates[j]))
            alone += sum(len(chunks[j]) for j in ranked[:count])
            union |= set(ranked[:count])
        together += len(piece) * sum(len(chunks[j]) for j in union)
    assert pattern.inefficiency(call) == pytest.approx(together / alone, rel=1e-5)


def test_alike_queries_lose_less_to_blocks_than_independent_ones():
    pattern = Moba(0.25, rule="row", partition="boxes")
    independent, alike = (pattern.inefficiency(make_call((5, 18, 20), block=64, smooth=s, seed=3)) for s in (0, 4))
    assert 1.5 < alike < 3.2 < 3.8 < independent <= 4.01


def test_values_out_of_range_are_refused():
    for values in ({"partition": "rings"}, {"rule": "above"}, {"chunk": 0}):
        with pytest.raises(ValueError, match="allowed"):
            Moba(0.3, **values)
