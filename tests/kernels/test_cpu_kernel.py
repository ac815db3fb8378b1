"""The compiled CPU kernel where its tiles end: rows, keys, channels, means, and calls beside each other."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist.kernels import BlockLayout, Means, attention_with_pooled_tail, block_sparse_attention, uniform_bounds
from pointillist.kernels import reference as definition
from pointillist.kernels.cpu import block_sparse, build, operators


@pytest.fixture(autouse=True)
def compiled():
    if build.kernel()[0] is None:
        pytest.skip(build.kernel()[1])


def drawn_bounds(length, blocks, batch, heads):
    cuts = torch.randint(length + 1, (batch, heads, blocks - 1)).sort(-1)[0]
    return torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=length).int()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_size_equals_the_definition(data):
    """Query blocks of several tasks, keys of several tiles, odd channels, padding, means that only some see."""
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    head_dim = data.draw(st.sampled_from([1, 7, 15, 16, 17, 31, 33, 48, 64, 100, 128, 200, 256]))
    q_len, k_len = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 700))
    query_bounds = drawn_bounds(q_len, data.draw(st.integers(1, 9)), batch, heads)
    key_bounds = drawn_bounds(k_len, data.draw(st.integers(1, 40)), batch, heads)
    rows, columns = query_bounds.shape[-1] - 1, key_bounds.shape[-1] - 1
    kept = torch.rand(batch, heads, rows, columns) < data.draw(st.floats(0, 1))
    orders = [torch.rand(batch, heads, n).argsort(-1) if data.draw(st.booleans()) else None for n in (q_len, k_len)]
    lengths = torch.randint(0, k_len + 1, (batch,)) if data.draw(st.booleans()) else None
    layout = BlockLayout.from_bounds(
        kept, query_bounds, key_bounds, q_len, k_len, query_order=orders[0], key_order=orders[1], key_lengths=lengths
    )
    q, k, v = (torch.randn(batch, n, heads, head_dim).transpose(1, 2) for n in (q_len, k_len, k_len))
    number = data.draw(st.sampled_from([0, 1, 40, 300]))
    means = None
    if number:
        counts = torch.randint(0, 9, (1, heads, number)).log()  # some stand for nothing
        pairs = torch.rand(batch, 1, rows, number) < 0.5
        means = Means(*(torch.randn(batch, heads, number, head_dim) for _ in range(2)), counts, pairs)
    chosen = torch.randperm(rows)[: rows // 2 + 1] if data.draw(st.booleans()) else None
    wide = means and Means(means.keys.double(), means.values.double(), means.log_counts, means.pairs)
    expected, lse = definition.attention(q.double(), k.double(), v.double(), layout, 0.2, wide, chosen)
    actual, actual_lse = block_sparse.attention(q, k, v, layout, 0.2, means, chosen)
    torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(actual_lse.double(), lse, atol=2e-5, rtol=2e-6)


def test_means_that_nobody_sees_may_hold_anything():
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    layout = BlockLayout.from_mask(torch.eye(4, dtype=torch.bool)[None, None], 16, 16, 64, 64)
    keys, values, counts = torch.randn(1, 1, 6, 16), torch.randn(1, 1, 6, 16), torch.zeros(1, 1, 6)
    pairs = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    pairs[..., 2], counts[..., 4] = False, float("-inf")
    expected = attention_with_pooled_tail(q, k, v, layout, means=Means(keys, values, counts, pairs), backend="cpu")
    keys[:, :, [2, 4]], values[:, :, [2, 4]] = float("nan"), float("inf")
    actual = attention_with_pooled_tail(q, k, v, layout, means=Means(keys, values, counts, pairs), backend="cpu")
    assert torch.equal(actual, expected)


def test_logits_far_apart():
    """Weights that vanish beside others, in the same tile of keys and in others, and all of them far below 0."""
    q, k, v = torch.randn(1, 1, 40, 32), torch.randn(1, 1, 600, 32), torch.randn(1, 1, 600, 32)
    k[:, :, 300:] *= 200
    layout = BlockLayout.from_mask(torch.ones(1, 1, 2, 10, dtype=torch.bool), 32, 64, 40, 600)
    for factor in (1.0, -1.0):
        expected, lse = definition.attention(q.double() * factor, k.double(), v.double(), layout, 1.0)
        actual, actual_lse = block_sparse.attention(q * factor, k, v, layout, 1.0)
        torch.testing.assert_close(actual.double(), expected, atol=2e-3, rtol=1e-3)  # logits are near 1000
        torch.testing.assert_close(actual_lse.double(), lse, atol=1e-3, rtol=1e-6)
    q[:], k[:] = 1e20, -1e20  # every logit is minus infinity
    out, lse = block_sparse.attention(q, k, v, layout, 1.0)
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_a_kept_nan_shows():
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    layout = BlockLayout.from_mask(torch.eye(2, dtype=torch.bool)[None, None], 32, 32, 64, 64)
    k[0, 0, 5, 3] = float("nan")
    out, lse = block_sparse.attention(q, k, v, layout, 1.0)
    assert out[:, :, :32].isnan().all() and lse[:, :, :32].isnan().all()
    assert out[:, :, 32:].isfinite().all() and lse[:, :, 32:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_as_it_is(dtype):
    """A query that sees one key gives its value: subnormal numbers, infinities and NaN too."""
    v = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    k = torch.zeros_like(v)
    layout = BlockLayout.from_mask(torch.eye(256, dtype=torch.bool)[None, None], 1, 1, 256, 256)
    out, _ = block_sparse.attention(k, k, v, layout, 1.0)
    torch.testing.assert_close(out, v, rtol=0, atol=0, equal_nan=True)


def test_wide_heads_and_float64_go_by_operators(monkeypatch):
    calls = []
    monkeypatch.setattr(operators, "attention", lambda *arguments: calls.append(arguments) or (None, None))
    layout = BlockLayout.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool), 8, 8, 8, 8)
    for x in (torch.randn(1, 1, 8, 257), torch.randn(1, 1, 8, 16, dtype=torch.float64)):
        block_sparse.attention(x, x, x, layout, 1.0)
    assert len(calls) == 2


def test_calls_beside_each_other_share_the_threads():
    """More callers than threads in the pool: each is done, and has what it has alone."""
    q, k, v = (torch.randn(1, 2, 300, 32) for _ in range(3))
    layout = BlockLayout.from_mask(torch.rand(1, 2, 10, 10) < 0.5, 32, 32, 300, 300)
    alone = block_sparse_attention(q, k, v, layout, backend="cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(5, initializer=torch.set_num_threads, initargs=(2,)) as pool:
            found = list(pool.map(lambda _: block_sparse_attention(q, k, v, layout, backend="cpu"), range(40)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, alone) for each in found)


def test_layouts_from_slices():
    """Bounds, orders and masks that are views: their strides are heeded, or they are copied."""
    q, k, v = (torch.randn(2, 2, 48, 16) for _ in range(3))
    order = torch.rand(2, 2, 48).argsort(-1)
    plain = BlockLayout.from_bounds(
        torch.rand(2, 2, 3, 3) < 0.7, uniform_bounds(48, 16), uniform_bounds(48, 16), 48, 48, key_order=order
    )
    spread = torch.stack([order, order], -1)[..., 0]
    bounds = torch.stack([uniform_bounds(48, 16)] * 2, -1)[:, 0]
    sliced = BlockLayout.from_bounds(plain.mask(), bounds, bounds, 48, 48, key_order=spread)
    assert not spread.is_contiguous()
    for one, other in zip(*(block_sparse.attention(q, k, v, x, 1.0) for x in (plain, sliced)), strict=True):
        assert torch.equal(one, other)
