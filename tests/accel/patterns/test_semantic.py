"""`semantic` against plain definitions: k-means, top-p with a floor, and SVG-EAR's error, in loops and in float64."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pointillist.accel.patterns.semantic as semantic
from pattern_checks import laid_out, make_call, video_mask
from pointillist.accel.layouts import Group, lay_out
from pointillist.accel.patterns.halving import halves
from pointillist.accel.patterns.semantic import Semantic, log_errors
from pointillist.accel.tails import attend

GRID = (5, 6, 7)
TOKENS = 210


def double_call(**options):
    call = make_call(GRID, batch=2, heads=2, smooth=2, **options)
    return replace(call, q=2 * call.q.double(), k=2 * call.k.double(), v=call.v.double())


def members(blocks, b, h):
    """The tokens of every block, as lists."""
    order, bounds = (x.expand(2, 2, -1)[b, h].tolist() for x in (blocks.order, blocks.bounds))
    return [order[start:stop] for start, stop in pairwise(bounds)]


def plain_means(x, blocks):
    """[2, 2, n, D]; 0 for empty clusters."""
    found = x.new_zeros(2, 2, blocks.count, x.shape[-1])
    for b in range(2):
        for h in range(2):
            for i, tokens in enumerate(members(blocks, b, h)):
                found[b, h, i] = x[b, h, tokens].mean(0) if tokens else 0
    return found


def plain_scores(call, selection, b, h):
    """Rows of scores of cluster means, None for empty clusters; and the clusters."""
    queries, keys = members(selection.queries, b, h), members(selection.keys, b, h)
    means = [
        [x[b, h, tokens].mean(0) if tokens else None for tokens in clusters]
        for x, clusters in ((call.q, queries), (call.k, keys))
    ]
    scores = [[None if q is None or k is None else float(q @ k) * call.scale for k in means[1]] for q in means[0]]
    return scores, queries, keys


def spend(ranked, areas, budget):
    """The pairs in the order of `ranked` whose middle is still within the budget."""
    taken, used = set(), 0.0
    for pair in ranked:
        if used + areas[pair] / 2 <= budget:
            taken.add(pair)
        used += areas[pair]
    return taken


def plain_choice(scores, queries, keys, density, floor):
    """Top-p ∪ floor, p such that it spends the budget: kept pairs and those of the floor."""
    areas, before, floored, best = {}, {}, set(), set()
    for i, row in enumerate(scores):
        if not queries[i]:
            continue
        ranked = sorted((j for j, score in enumerate(row) if score is not None), key=lambda j: -row[j])
        weights = {j: len(keys[j]) * math.exp(row[j] - row[ranked[0]]) for j in ranked}
        total, above = sum(weights.values()), 0.0
        for j in ranked:
            areas[i, j], before[i, j] = len(queries[i]) * len(keys[j]), above / total
            above += weights[j]
        best.add((i, ranked[0]))
        floored |= spend([(i, j) for j in ranked], areas, min(floor, density) * TOKENS * len(queries[i]))
    floored |= best
    ranked = sorted(areas, key=lambda pair: before[pair] - (pair in floored))
    return spend(ranked, areas, density * TOKENS**2) | best, floored


def kept_pairs(selection, b, h):
    return {tuple(pair) for pair in selection.mask[b, h].nonzero().tolist()}


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("density", [0.02, 0.15, 0.4])
def test_clusters_are_kept_by_top_p_with_a_floor(density, floor):
    call = double_call()
    selection = Semantic(density, floor=floor).select(call)
    for b in range(2):
        for h in range(2):
            expected, _ = plain_choice(*plain_scores(call, selection, b, h), density, floor)
            assert kept_pairs(selection, b, h) == expected


def plain_errors(call, queries, keys, b, h):
    """ln Σ_t ‖e^(q̄·k_t) v_t − e^(q̄·k̄) v̄‖² − ln(n_i n_j) of every pair of clusters that are not empty."""
    errors = {}
    for i, rows in enumerate(queries):
        for j, columns in enumerate(keys):
            if rows and columns:
                q, k, v = call.q[b, h, rows].mean(0), call.k[b, h, columns], call.v[b, h, columns]
                wanted = (k @ q * call.scale).exp()[:, None] * v
                got = (k.mean(0) @ q * call.scale).exp() * v.mean(0)
                errors[i, j] = float((wanted - got).square().sum().log()) - math.log(len(rows) * len(columns))
    return errors


def test_error_routing_spends_each_row_on_the_largest_errors():
    call = double_call()
    likely = Semantic(0.3).select(replace(call, memory={}))
    selection = Semantic(0.3, routing="error").select(replace(call, memory={}))
    assert not torch.equal(likely.mask, selection.mask)
    for b in range(2):
        for h in range(2):
            scores, queries, keys = plain_scores(call, selection, b, h)
            kept, floored = plain_choice(scores, queries, keys, 0.3, 0.1)
            assert kept == kept_pairs(likely, b, h)
            errors, expected = plain_errors(call, queries, keys, b, h), set()
            for i in range(len(queries)):
                row = {pair: len(keys[pair[1]]) for pair in errors if pair[0] == i}
                budget = sum(row[pair] for pair in kept if pair[0] == i)
                safe = floored & kept
                expected |= spend(sorted(row, key=lambda pair: (pair not in safe, -errors[pair])), row, budget)
            assert kept_pairs(selection, b, h) == expected


def test_errors_follow_the_formula_and_stay_finite(monkeypatch):
    """However many are computed at a time."""
    call = double_call()
    call = replace(call, v=call.v + 2)  # so that the mean of a cluster counts
    selection = Semantic(0.3).select(call)
    means = [plain_means(*each) for each in ((call.q, selection.queries), (call.k, selection.keys))]
    for at_once in (semantic.SCORES_AT_ONCE, 1):
        monkeypatch.setattr(semantic, "SCORES_AT_ONCE", at_once)
        found = log_errors(means[0], call.k, call.v, selection.keys, means[1], call.scale)
        found = found + 2 * means[0] @ means[1].mT * call.scale
        for b in range(2):
            for h in range(2):
                queries, keys = members(selection.queries, b, h), members(selection.keys, b, h)
                for (i, j), error in plain_errors(call, queries, keys, b, h).items():
                    if len(keys[j]) > 1:  # the mean of one token is exact
                        expected = error + math.log(len(queries[i]))
                        assert float(found[b, h, i, j]) == pytest.approx(expected, abs=1e-6)
    large = log_errors(means[0].float() * 1e3, call.k.float(), call.v.float(), selection.keys, means[1].float(), 1.0)
    assert large.isfinite().all()


def test_an_error_routed_tail_errs_less():
    """What the method is for: at equal density, the output with block means is nearer to that of dense attention."""
    errors = []
    for seed in range(3):
        call = make_call((4, 8, 8), heads=2, smooth=2, seed=seed)
        call = replace(call, q=3 * call.q)
        dense = (call.q @ call.k.mT * call.scale).softmax(-1) @ call.v
        for routing in ("probability", "error"):
            part = (Group(Semantic(0.2, routing=routing)), Semantic(0.2, routing=routing).select(call))
            call.memory.clear()
            out = attend(call, lay_out([part], call), "pooled")
            errors.append(float((out - dense).square().mean()))
    assert sum(errors[1::2]) < sum(errors[::2])


def lloyd(x, centroids, iterations):
    """Plain k-means of x [N, D]: clusters of the last assignment and their means."""
    for _ in range(iterations):
        labels = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        clusters = [(labels == c).nonzero()[:, 0].tolist() for c in range(len(centroids))]
        centroids = torch.stack([x[t].mean(0) if t else centroids[c] for c, t in enumerate(clusters)])
    return clusters, centroids


def test_centroids_move_on_from_call_to_call():
    """The first call starts at tokens and makes `iterations_first` assignments, later ones `iterations` from there."""
    first, second, memory = double_call(), double_call(), {}
    pattern = Semantic(0.3, iterations_first=3, iterations=2, query_clusters=9, key_clusters=17)
    selections = [pattern.select(replace(call, memory=memory)) for call in (first, second)]
    for b in range(2):
        for h in range(2):
            for count, of_q in ((9, True), (17, False)):
                centroids = None
                for call, selection, iterations in zip((first, second), selections, (3, 2), strict=True):
                    x = (call.q if of_q else call.k)[b, h]
                    start = x[semantic._first_tokens(TOKENS, count, x.device)] if centroids is None else centroids
                    clusters, centroids = lloyd(x, start, iterations)
                    assert members(selection.queries if of_q else selection.keys, b, h) == clusters


def test_the_last_dense_step_warms_the_clusters_and_other_memories_stay_cold():
    """A branch, an expert or a generation has a memory of its own, and nothing else is remembered."""
    call = double_call()
    pattern = Semantic(0.3, iterations_first=3, iterations=2)
    pattern.prepare(call, call.q)
    warm = pattern.select(call)
    assert torch.equal(warm.keys.order, Semantic(0.3, iterations_first=5).select(replace(call, memory={})).keys.order)
    cold = pattern.select(replace(call, memory={}))
    assert not torch.equal(warm.keys.order, cold.keys.order)
    assert torch.equal(cold.keys.order, Semantic(0.3, iterations_first=3).select(replace(call, memory={})).keys.order)
    assert len(set(semantic._first_tokens(TOKENS, 50, call.device).tolist())) == 50


def test_the_number_of_clusters_follows_the_blocks():
    call = make_call(GRID)
    selection = Semantic(0.3).select(call)
    assert (selection.queries.count, selection.keys.count) == (14, 27)
    small = Semantic(0.3).select(make_call((1, 2, 3), block=128))
    assert (small.queries.count, small.keys.count) == (6, 6)
    wished = Semantic(0.3, query_clusters=5, key_clusters=12).select(make_call(GRID))
    assert (wished.queries.count, wished.keys.count) == (5, 12)


@pytest.mark.parametrize("options", [{}, {"routing": "error"}, {"rule": "row"}, {"rule": "above"}, {"rule": "head"}])
def test_empty_clusters_are_never_kept_and_no_query_is_left_alone(options):
    """Four kinds of tokens fill at most four clusters."""
    call = make_call(GRID, heads=2)
    kinds = torch.randn(4, 16)
    q, k = (kinds[torch.randint(4, (2, 2, TOKENS))] for _ in range(2))
    selection = Semantic(0.01, **options).select(replace(call, q=q, k=k))
    filled_q, filled_k = selection.queries.sizes > 0, selection.keys.sizes > 0
    assert filled_q.sum(-1).max() <= 4 and filled_k.sum(-1).max() <= 4
    assert not (selection.mask & ~(filled_q[..., None] & filled_k[..., None, :])).any()
    assert torch.equal(selection.mask.any(-1), filled_q)


@pytest.mark.parametrize(
    "options", [{"rule": rule} for rule in semantic.RULES] + [{"routing": "error"}, {"balanced": True}]
)
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_options_keep_to_the_density(options, floor):
    """A floor is part of the budget, not on top of it. The rule that sorts nothing is near its density only."""
    call = make_call((4, 8, 8), smooth=2, heads=2)
    for density in (0.1, 0.35):
        laid = laid_out(Semantic(density, floor=floor, **options), call)
        within = 0.1 if options.get("rule") == "above" and floor == 0 else 0.02
        assert float(laid.density) == pytest.approx(density, abs=within)
        assert video_mask(laid, call).any(-1).all()


def test_balanced_clusters_are_equal_in_size_and_alike():
    """Seven heaps of 30 tokens, far from each other along a line: every cut falls between two of them."""
    heap = torch.randperm(TOKENS) % 7
    direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
    x = 100 * heap[:, None] * direction + torch.randn(2, 3, TOKENS, 16)
    blocks = halves(x, 7)
    for b in range(2):
        for h in range(3):
            found = heap[blocks.order[b, h]].unflatten(0, (7, 30))
            assert (found == found[:, :1]).all() and len(set(found[:, 0].tolist())) == 7
    side = (torch.randperm(TOKENS) % 2).float()
    x = torch.cat([20 * side.expand(2, 3, -1)[..., None], 4 * torch.randn(2, 3, TOKENS, 31)], dim=-1)
    found = side[halves(x, 2).order].unflatten(-1, (2, TOKENS // 2))  # the most of the first token is not the largest
    assert (found == found[..., :1]).all()
    selection = Semantic(0.3, balanced=True).select(make_call(GRID, block=16))
    for blocks in (selection.queries, selection.keys):
        assert blocks.sizes.unique().tolist() == [15.0] and blocks.largest == 15
        assert torch.equal(blocks.order.sort(-1).values, torch.arange(TOKENS).expand(2, 3, -1))
    assert set(halves(x, 20).sizes.flatten().tolist()) == {10.0, 11.0}


@pytest.mark.parametrize(
    "options", [{"rule": "best"}, {"routing": "none"}, {"floor": 1.5}, {"iterations": 0}, {"query_clusters": -1}]
)
def test_wrong_values_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Semantic(0.3, **options)


@pytest.mark.parametrize("options", [{}, {"routing": "error", "rule": "hybrid"}, {"rule": "head"}, {"balanced": True}])
def test_nothing_waits_for_the_device(options):
    """Fake tensors have no values to wait for."""
    call, pattern = make_call(GRID), Semantic(0.3, **options)
    pattern.select(call)  # fills the caches
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, v = (mode.from_tensor(x) for x in (call.q, call.k, call.v))
        assert pattern.select(replace(call, q=q, k=k, v=v, memory={})).mask.shape[:2] == (2, 3)
