"""`vertical_slash` against its definition: columns and diagonals taken one after the other."""

from dataclasses import replace

import pytest
import torch

from pattern_checks import laid_out, make_call, selected, video_mask
from pointillist.accel.orders import order_of
from pointillist.accel.patterns.rows import sampled_places
from pointillist.accel.patterns.vertical_slash import VerticalSlash


def plain(q, k, scale, block, density, vertical):
    """bool [n, n] of one head, q and k [N, D] in order; the key blocks of its columns; its diagonals, ranked."""
    tokens = len(q)
    columns, diagonals = [0.0] * tokens, dict.fromkeys(range(1 - tokens, tokens), 0.0)
    for query in sampled_places(tokens):
        for key, weight in enumerate((k @ q[query] * scale).softmax(0).tolist()):
            columns[key] += weight
            diagonals[key - query] += weight
    blocks = [range(start, min(start + block, tokens)) for start in range(0, tokens, block)]
    allowed, chosen = vertical * (density * tokens / block - 1), set()
    for key in sorted(range(tokens), key=lambda key: -columns[key]):
        if len(chosen | {key // block}) > allowed:
            break
        chosen.add(key // block)
    ranking = sorted(diagonals, key=lambda d: -diagonals[d])
    ranks = {d: rank for rank, d in enumerate(ranking)}
    wishes = []
    for i, queries in enumerate(blocks):
        for j, keys in enumerate(blocks):
            best = min({key - query for query in queries for key in keys}, key=ranks.get)
            centre = (keys[0] + keys[-1]) / 2 - (queries[0] + queries[-1]) / 2
            wish = -2 if i == j else -1 if j in chosen else ranks[best] + abs(best - centre) / block
            wishes.append((wish, i, j))
    mask, area = torch.eye(len(blocks), dtype=torch.bool), 0
    for _, i, j in sorted(wishes):
        own = len(blocks[i]) * len(blocks[j])
        if area + own / 2 <= density * tokens**2:
            mask[i, j] = True
        area += own
    return mask, chosen, ranking


@pytest.mark.parametrize(("grid", "order"), [((5, 6, 7), "thw"), ((5, 6, 7), "hwt"), ((1, 11, 13), "gilbert")])
def test_it_keeps_the_blocks_of_the_heaviest_columns_and_diagonals(grid, order):
    call = make_call(grid, smooth=2)
    call.k[:, -1] = 2 * call.q[:, -1].roll(23, 1)  # a head that looks away from itself
    call = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    places = order_of(order, grid)
    for density, vertical in ((0.25, 0.5), (0.4, 0.5), (0.4, 1.0), (0.4, 0.0)):
        selection = selected(VerticalSlash(density, vertical, order), call)
        for b in range(2):
            for h in range(3):
                q, k = call.q[b, h, places], call.k[b, h, places]
                mask, chosen, ranking = plain(q, k, call.scale, 16, density, vertical)
                assert torch.equal(selection.mask[b, h], mask)
                assert density < 0.4 or (len(chosen) > 0) == (vertical > 0)
                assert mask[:, sorted(chosen)].all(), "columns are whole"
                if vertical < 1 and density == 0.4:
                    assert diagonal_blocks(ranking[0], places.numel(), mask), "the first diagonal is whole"


def diagonal_blocks(distance, tokens, mask):
    """Whether all the block pairs that a diagonal crosses are kept."""
    return all(mask[query // 16, (query + distance) // 16] for query in range(tokens) if 0 <= query + distance < tokens)


def test_a_column_that_only_early_queries_look_at_is_found():
    """The last queries, on which MInference looks, do not look at it."""
    call = make_call((5, 6, 7), batch=1, heads=1)
    q, k = call.q * 0.1, call.k * 0.1
    k[0, 0, 100] = 8
    q[0, 0, :120] += 1
    q[0, 0, 120:] -= 1
    kept = video_mask(laid_out(VerticalSlash(0.3), replace(call, q=q, k=k)), call)
    assert kept[0, 0, :, 100].all()


@pytest.mark.parametrize("distance", [-64, 64])
def test_diagonals_go_both_ways(distance):
    call = make_call((5, 6, 7), batch=1, heads=1, dim=32)
    q = torch.nn.functional.normalize(call.q, dim=-1) * 12
    k = q.roll(distance, 2)
    kept = video_mask(laid_out(VerticalSlash(0.2, vertical=0), replace(call, q=q, k=k)), call)[0, 0]
    assert kept.diagonal(distance).all() and not kept.diagonal(-distance).all()


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"vertical is 1\.5"):
        VerticalSlash(0.2, vertical=1.5)
    with pytest.raises(ValueError, match="order is 'tiles'"):
        VerticalSlash(0.2, order="tiles")
