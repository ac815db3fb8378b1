"""Linear attention, block masses, pyramids, INT8, clustering, selection: each against its definition."""

import numpy as np
import pytest
import scipy.cluster.vq
import torch

from pointillist.kernels import (
    BlockLayout,
    Means,
    above,
    attention_with_pooled_tail,
    block_masses,
    block_sparse_attention,
    k_means,
    linear_attention,
    pool_blocks,
    pooled_attention,
    reference,
    top_k,
    top_p,
    uniform_bounds,
)
from pointillist.kernels.clustering import nearest
from pointillist.kernels.quantization import from_int8, quantize, to_int8


def some_layout(q_len=70, k_len=90, batch=2, heads=2, **extra):
    """Blocks of their own in every head, one of them empty."""
    bounds = [
        torch.stack(
            [torch.tensor([0, *sorted(torch.randint(1, n, (3,)).tolist()), n, n]) for _ in range(batch * heads)]
        )
        for n in (q_len, k_len)
    ]
    return BlockLayout.from_bounds(
        torch.rand(batch, heads, 5, 5) < 0.5, *(b.int().view(batch, heads, -1) for b in bounds), q_len, k_len, **extra
    )


def feature_map(x):
    return torch.nn.functional.elu(x) + 1


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_linear_attention(backend, dtype, padded):
    q, k, v = (torch.randn(2, 2, n, 24).to(dtype) for n in (70, 90, 90))
    orders = dict(query_order=torch.rand(2, 2, 70).argsort(-1), key_order=torch.rand(2, 2, 90).argsort(-1))
    layout = some_layout(**orders, key_lengths=torch.tensor([90, 40]) if padded else None)
    if padded:
        k[1, :, 40:], v[1, :, 40:] = float("nan"), float("nan")
    pairs = ~layout.mask()
    pairs[0, 1, 2] = False  # sees nothing
    exact = reference.linear_attention(q.double(), k.double(), v.double(), feature_map, layout, pairs)
    plain = reference.linear_attention(q, k, v, lambda x: feature_map(x).to(dtype).to(x.dtype), layout, pairs)
    actual = linear_attention(q, k, v, feature_map, layout, pairs=pairs, backend=backend)
    assert actual.dtype == dtype
    rounded = exact.to(dtype)
    slack = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max()  # the interpreter cuts bfloat16 off instead of rounding it
    assert (actual.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + slack + 1e-6


def test_linear_attention_over_all_pairs_is_the_textbooks():
    q, k, v = (torch.randn(1, 2, 50, 16, dtype=torch.float64) for _ in range(3))
    layout = BlockLayout.from_mask(torch.zeros(1, 1, 4, 4, dtype=torch.bool), 16, 16, 50, 50)
    weights = feature_map(q) @ feature_map(k).mT
    expected = weights / weights.sum(-1, keepdim=True) @ v
    for backend in ("reference", "cpu"):
        torch.testing.assert_close(linear_attention(q, k, v, feature_map, layout, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_block_masses_are_sums_of_softmax(backend, padded):
    q, k = torch.randn(2, 2, 70, 16), torch.randn(2, 2, 90, 16)
    lengths = torch.tensor([90, 40]) if padded else None
    layout = some_layout(key_order=torch.rand(2, 2, 90).argsort(-1), key_lengths=lengths)
    scores = q.double() @ k.double().mT / 4
    if padded:
        scores[1, :, :, 40:] = float("-inf")
    weights, lse = scores.softmax(-1), scores.logsumexp(-1)
    masses = block_masses(q, k, lse.float(), layout, backend=backend)
    assert masses.dtype == torch.float32
    for b in range(2):
        for h in range(2):
            rows, columns, order = layout.query_bounds[b, h], layout.key_bounds[b, h], layout.key_order[b, h]
            for i in range(5):
                for j in range(5):
                    part = weights[b, h, rows[i] : rows[i + 1]][:, order[columns[j] : columns[j + 1]]]
                    expected = part.sum(1).mean() if rows[i] < rows[i + 1] else 0.0
                    assert abs(masses[b, h, i, j] - expected) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_pyramid_is_one_softmax_over_its_levels(backend):
    """Blocks of 32 keys: exact, as pairs of keys, as one mean, or skipped (PSA, section 3)."""
    q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
    level = torch.randint(0, 4, (1, 2, 4, 4))
    layout = BlockLayout.from_mask(level == 1, 32, 32, 128, 128)
    keys, values, logs, pairs = [], [], [], []
    for number, size in ((2, 2), (3, 32)):
        bounds = uniform_bounds(128, size)
        (mean_k, counts), (mean_v, _) = pool_blocks(k, bounds), pool_blocks(v, bounds)
        keys, values, logs = [*keys, mean_k], [*values, mean_v], [*logs, counts.log()]
        pairs.append((level == number).repeat_interleave(32 // size, dim=-1))
    means = Means(torch.cat(keys, 2), torch.cat(values, 2), torch.cat(logs, 2), torch.cat(pairs, 3))
    actual = attention_with_pooled_tail(q, k, v, layout, backend=backend, means=means)
    for h in range(2):
        for i in range(4):
            some_k, some_v, bias = [], [], []
            for j in range(4):
                size = {0: 0, 1: 1, 2: 2, 3: 32}[int(level[0, h, i, j])]
                if size:
                    some_k.append(k[0, h, 32 * j : 32 * j + 32].unflatten(0, (-1, size)).mean(1))
                    some_v.append(v[0, h, 32 * j : 32 * j + 32].unflatten(0, (-1, size)).mean(1))
                    bias.append(torch.full((32 // size,), float(size)).log())
            expected = torch.zeros(32, 16)
            if some_k:
                logits = q[0, h, 32 * i : 32 * i + 32] @ torch.cat(some_k).T / 4 + torch.cat(bias)
                expected = logits.softmax(-1) @ torch.cat(some_v)
            torch.testing.assert_close(actual[0, h, 32 * i : 32 * i + 32], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_pooled_attention_equals_the_definition(backend):
    q, means, values = torch.randn(2, 3, 50, 16), torch.randn(2, 3, 70, 16), torch.randn(2, 3, 70, 16)
    counts, pairs = torch.rand(2, 3, 70) + 1, torch.rand(2, 3, 4, 70) < 0.4
    counts[0, 0, :60] = 0  # hidden from all
    pairs[1, 1, 2] = False
    arguments = dict(pairs=pairs, query_bounds=uniform_bounds(50, 16))
    expected = pooled_attention(q, means, values, counts.log(), **arguments, backend="reference")
    actual = pooled_attention(q, means, values, counts.log(), **arguments, backend=backend)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int8_fp8"])
def test_quantized_is_attention_of_the_rounded_inputs(backend, dtype, kind):
    q, k, v = (torch.randn(2, 2, n, 32).to(dtype) for n in (100, 150, 150))
    k += 3 * torch.randn(1, 1, 1, 32).to(dtype)  # outlier channels
    lengths = torch.tensor([150, 70])
    k[1, :, 70:], v[1, :, 70:] = float("nan"), float("nan")
    layout = BlockLayout.from_mask(
        torch.rand(2, 2, 4, 5) < 0.7, 32, 32, 100, 150,
        query_order=torch.rand(2, 2, 100).argsort(-1), key_order=torch.rand(2, 2, 150).argsort(-1), key_lengths=lengths,
    )  # fmt: skip
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend, quantized=kind)
    rounded = quantize(q, k, layout, v)
    rounded_q, rounded_k = from_int8(rounded.q, rounded.q_scales), from_int8(rounded.k, rounded.k_scales)
    values = v.float()
    if kind == "int8_fp8":
        values = torch.empty(v.shape).scatter_(
            2, layout.key_order[..., None].expand_as(v), rounded.v.float() * rounded.v_scales[:, :, None]
        )
    back = [torch.empty_like(x).scatter_(2, o[..., None].expand_as(x), x)
            for x, o in ((rounded_q, layout.query_order), (rounded_k + rounded.k_mean, layout.key_order))]  # fmt: skip
    expected, _ = reference.attention(back[0], back[1], values, layout, 32**-0.5)
    # with FP8 values Triton's weights are FP8 too, 3 bits of fraction
    assert (out.float() - expected).norm() <= (0.01 if kind == "int8" or backend == "cpu" else 0.06) * expected.norm()
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), layout, 32**-0.5)
    assert (out.double() - exact).norm() <= (0.05 if kind == "int8" else 0.08) * exact.norm()
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen) and (lse - exact_lse)[seen].abs().max() < 0.1


def test_smoothing_makes_int8_more_exact():
    q, k = torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64) + 5 * torch.randn(1, 1, 1, 64)
    layout = BlockLayout.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool), 128, 128, 128, 128)
    rounded, exact = quantize(q, k, layout), (q @ k.mT).softmax(-1)
    rounded_q = from_int8(rounded.q, rounded.q_scales)
    smooth = (rounded_q @ from_int8(rounded.k, rounded.k_scales).mT).softmax(-1)
    plain = (rounded_q @ from_int8(*to_int8(k)).mT).softmax(-1)
    assert (smooth - exact).norm() < 0.5 * (plain - exact).norm()


@pytest.mark.parametrize("iterations", [1, 4])
def test_k_means_is_lloyds(iterations):
    x = torch.randn(2, 2, 200, 8, dtype=torch.float64)
    start = x[:, :, torch.randperm(200)[:6]].clone()
    clusters = k_means(x, 6, iterations=iterations, centroids=start)
    for b in range(2):
        for h in range(2):
            expected, _ = scipy.cluster.vq.kmeans2(x[b, h].numpy(), start[b, h].numpy(), iterations, minit="matrix")
            np.testing.assert_allclose(clusters.centroids[b, h], expected, atol=1e-9)
    order, labels = clusters.order, clusters.labels
    assert torch.equal(order.sort(-1)[0], torch.arange(200).expand(2, 2, -1))
    assert (labels.gather(2, order).diff(dim=-1) >= 0).all()


def test_k_means_repeats_and_leaves_the_global_generator_alone():
    x = torch.randn(1, 2, 100, 16)
    state = torch.get_rng_state()
    first, again, other = (k_means(x, 9, iterations=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.order, again.order) and torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)
    with pytest.raises(ValueError, match="count is 101"):
        k_means(x, 101, iterations=1)


def test_an_empty_cluster_keeps_its_centroid():
    x = torch.randn(1, 1, 50, 4)
    far = torch.full((1, 1, 1, 4), 100.0)
    clusters = k_means(x, 3, iterations=2, centroids=torch.cat([x[:, :, :1], far, x[:, :, 1:2]], 2))
    assert clusters.bounds[0, 0].diff()[1] == 0 and torch.equal(clusters.centroids[0, 0, 1], far[0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_helpers_in_triton_equal_those_in_torch(dtype):
    pytest.importorskip("triton", reason="triton has no build for this platform")
    from pointillist.kernels.triton.nearest import nearest as nearest_in_triton
    from pointillist.kernels.triton.permute import permute
    from pointillist.kernels.triton.pooling import pool_blocks as means_in_triton

    x, centroids = torch.randn(2, 100, 3, 24).to(dtype).transpose(1, 2), torch.randn(2, 3, 70, 24).to(dtype)
    order = torch.rand(2, 3, 100).argsort(-1)
    index = order[..., None].expand_as(x)
    assert torch.equal(permute(x, order, False), x.gather(2, index))
    assert torch.equal(permute(permute(x, order, False), order, True), x)
    assert torch.equal(permute(x, order[:1, :1], False), x[:, :, order[0, 0]])

    distance = torch.cdist(x.double(), centroids.double())
    for labels in (nearest(x, centroids), nearest_in_triton(x, centroids)):
        assert labels.dtype == torch.int32
        found = distance.gather(3, labels[..., None].long())[..., 0]
        assert (found - distance.amin(-1) <= (1e-5 if dtype == torch.float32 else 0.05)).all()

    bounds = torch.tensor([0, 0, 7, 90, 100], dtype=torch.int32)
    valid = torch.arange(100) < torch.tensor([100, 50])[:, None, None]
    for lengths, flags in ((None, None), (torch.tensor([100, 50]), valid)):
        expected, _ = pool_blocks(x, bounds, lengths)
        actual = means_in_triton(x, bounds[None, None], flags)
        torch.testing.assert_close(actual, expected, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2)


def test_top_k():
    scores = torch.randn(2, 3, 4, 10)
    kept = top_k(scores, 3)
    assert (kept.sum(-1) == 3).all() and (
        scores[kept].view(2, 3, 4, 3).amin(-1) >= scores.masked_fill(kept, -9).amax(-1)
    ).all()
    per_head = top_k(scores, torch.tensor([1, 5, 10]))
    assert torch.equal(per_head.sum(-1), torch.tensor([1, 5, 10])[None, :, None].expand(2, 3, 4))
    assert torch.equal(per_head[:, 1], top_k(scores, 5)[:, 1])


def test_top_p_keeps_the_block_that_crosses():
    masses = torch.tensor([[[[0.1, 0.5, 0.05, 0.35], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]]])
    assert top_p(masses, 0.5).tolist()[0][0] == [
        [False, True, False, False], [False, True, False, False], [True, True, False, False],
    ]  # fmt: skip
    assert top_p(masses, 0.51).tolist()[0][0][0] == [False, True, False, True]
    assert (top_p(masses, 0.5, at_least=3).sum(-1) == 3).all()
    assert top_p(masses, 1.0)[0, 0, 0].all()
    p = torch.rand(2, 3, 1, 1)
    drawn = torch.rand(2, 3, 4, 20)
    kept = top_p(drawn, p)
    share = (drawn * kept).sum(-1) / drawn.sum(-1)
    without_least = share - drawn.masked_fill(~kept, 9).amin(-1) / drawn.sum(-1)
    assert (share >= p[..., 0] - 1e-6).all() and (without_least < p[..., 0] + 1e-6).all()


def test_above_keeps_the_highest_of_a_flat_row():
    assert above(torch.ones(1, 1, 2, 5), 1.0).all()
    masked = torch.tensor([[[[3.0, 2.9, 0.0, float("-inf")], [float("-inf")] * 4]]])
    assert above(masked, 0.0).tolist() == [[[[True, True, False, False], [False] * 4]]]
    scores = torch.randn(2, 2, 3, 4000)
    assert above(scores, 1.0).float().mean() == pytest.approx(0.1587, abs=0.02)  # a normal tail
