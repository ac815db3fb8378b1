"""Pooled attention, merging, and the two together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist.kernels import (
    BlockLayout,
    attention_with_pooled_tail,
    block_sparse_attention,
    dropped_of,
    merge_attention,
    pool_blocks,
    pooled_attention,
    uniform_bounds,
)

pytestmark = pytest.mark.usefixtures("cpu_kernel")


def tailed_by_hand(q, k, v, mask, block, query_order, key_order):
    """Exact where kept, block means where dropped: one softmax over a key list written out per query block."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(mask.shape[2]):
                rows = query_order[i * block : (i + 1) * block]
                keys, values, bias = [], [], []
                for j in range(mask.shape[3]):
                    tokens = key_order[j * block : (j + 1) * block]
                    if mask[b, h, i, j]:
                        keys.append(k[b, h, tokens])
                        values.append(v[b, h, tokens])
                        bias.append(torch.zeros(len(tokens), dtype=torch.float64))
                    else:
                        keys.append(k[b, h, tokens].mean(0, keepdim=True))
                        values.append(v[b, h, tokens].mean(0, keepdim=True))
                        bias.append(torch.tensor([float(len(tokens))], dtype=torch.float64).log())
                scores = q[b, h, rows] @ torch.cat(keys).T * q.shape[-1] ** -0.5 + torch.cat(bias)
                out[b, h, rows] = scores.softmax(-1) @ torch.cat(values)
    return out


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("ordered", [False, True])
def test_tail_equals_one_softmax_over_tokens_and_means(backend, ordered):
    length, block = 75, 16
    q, k, v = (torch.randn(2, 2, length, 32) for _ in range(3))
    mask = torch.rand(2, 2, 5, 5) < 0.4
    mask[0, 0, 0] = False  # only the tail is left
    mask[1, 1, 2] = True  # no tail is left
    query_order, key_order = (torch.randperm(length) if ordered else torch.arange(length) for _ in range(2))
    layout = BlockLayout.from_mask(
        mask, block, block, length, length,
        query_order=query_order[None, None] if ordered else None,
        key_order=key_order[None, None] if ordered else None,
    )  # fmt: skip
    expected = tailed_by_hand(q, k, v, mask, block, query_order, key_order)
    actual = attention_with_pooled_tail(q, k, v, layout, backend=backend)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_tail_counts_the_valid_keys_of_every_head(backend):
    """Orders differ between heads, so a block holds more padding in one head than in another."""
    q, k, v = (torch.randn(2, 3, 48, 16) for _ in range(3))
    lengths, orders = torch.tensor([48, 29]), torch.stack([torch.randperm(48) for _ in range(6)]).view(2, 3, 48)
    mask = torch.rand(2, 3, 3, 3) < 0.4
    layout = BlockLayout.from_mask(mask, 16, 16, 48, 48, key_order=orders, key_lengths=lengths)
    actual = attention_with_pooled_tail(q, k, v, layout, backend=backend)
    for b in range(2):
        for h in range(3):
            order = orders[b, h]
            blocks = [order[i : i + 16][order[i : i + 16] < lengths[b]] for i in (0, 16, 32)]
            for i in range(3):
                keys, values, bias = [], [], []
                for j, tokens in enumerate(blocks):
                    if mask[b, h, i, j]:
                        keys += [k[b, h, tokens]]
                        values += [v[b, h, tokens]]
                        bias += [torch.zeros(len(tokens))]
                    elif len(tokens):
                        keys += [k[b, h, tokens].mean(0, keepdim=True)]
                        values += [v[b, h, tokens].mean(0, keepdim=True)]
                        bias += [torch.tensor([float(len(tokens))]).log()]
                scores = q[b, h, 16 * i : 16 * i + 16] @ torch.cat(keys).T / 4 + torch.cat(bias)
                expected = scores.softmax(-1) @ torch.cat(values)
                torch.testing.assert_close(actual[b, h, 16 * i : 16 * i + 16], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tail_in_half_precision(backend, dtype):
    q, k, v = (torch.randn(1, 2, 75, 32).to(dtype) for _ in range(3))
    layout = BlockLayout.from_mask(torch.rand(1, 2, 5, 5) < 0.4, 16, 16, 75, 75)
    exact = attention_with_pooled_tail(q.double(), k.double(), v.double(), layout, backend="reference")
    actual = attention_with_pooled_tail(q, k, v, layout, backend=backend)
    whole = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    weights = (q.float() @ k.float().transpose(-1, -2) * 32**-0.5).softmax(-1).to(dtype)
    rounding = ((weights @ v).double() - whole).abs().max()  # of dense attention in this dtype
    rounded = exact.to(dtype)
    slack = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max()
    assert actual.dtype == dtype
    assert (actual.double() - exact).abs().max() <= 4 * rounding + slack  # the means and the merge are rounded too


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cpu_tail_equals_the_definition(data):
    """Blocks of any size, also none; orders and padding; unequal lengths; every head its own; odd head dimensions."""
    batch, heads, head_dim = (data.draw(st.integers(1, n)) for n in (3, 3, 33))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    bounds = []
    for _ in range(2):
        cuts = sorted(data.draw(st.lists(st.integers(0, 130), max_size=6)))
        bounds.append(torch.tensor([0, *cuts, max([130, *cuts])], dtype=torch.int32))
    q_len, k_len = (int(b[-1]) for b in bounds)
    own = data.draw(st.booleans())
    orders = [
        torch.stack([torch.randperm(n) for _ in range(batch * heads if own else 1)]).unflatten(
            0, (batch, heads) if own else (1, 1)
        )
        if data.draw(st.booleans())
        else None
        for n in (q_len, k_len)
    ]
    lengths = torch.randint(0, k_len + 1, (batch,)) if data.draw(st.booleans()) else None
    mask = torch.rand(batch, heads, *(len(b) - 1 for b in bounds)) < data.draw(st.floats(0, 1))
    layout = BlockLayout.from_bounds(
        mask, *bounds, q_len, k_len, query_order=orders[0], key_order=orders[1], key_lengths=lengths
    )
    q, k, v = (torch.randn(batch, n, heads, head_dim, dtype=dtype).transpose(1, 2) for n in (q_len, k_len, k_len))
    expected, actual = (attention_with_pooled_tail(q, k, v, layout, backend=name) for name in ("reference", "cpu"))
    torch.testing.assert_close(actual, expected, atol=3e-6, rtol=1e-5)


def test_pooled_attention_by_slices_is_the_same(monkeypatch):
    q, means, values = torch.randn(2, 3, 50, 16), torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16)
    counts, pairs = torch.rand(2, 3, 4) + 1, torch.rand(2, 3, 4, 4) < 0.7
    pairs[..., 0] = True
    arguments = dict(pairs=pairs, query_bounds=uniform_bounds(50, 16))
    whole = pooled_attention(q, means, values, counts.log(), **arguments)
    monkeypatch.setattr("pointillist.kernels.reference.SCORES_AT_ONCE", 200)
    torch.testing.assert_close(pooled_attention(q, means, values, counts.log(), **arguments), whole)


def test_merge_of_disjoint_halves_is_the_whole():
    q, k, v = torch.randn(1, 2, 30, 16), torch.randn(1, 2, 48, 16), torch.randn(1, 2, 48, 16)
    mask = torch.rand(1, 2, 2, 3) < 0.5
    mask[0, 0, 0], mask[0, 0, 1] = True, False  # empty on either side
    parts = [
        block_sparse_attention(q, k, v, BlockLayout.from_mask(m, 16, 16, 30, 48), return_lse=True)
        for m in (mask, ~mask)
    ]
    out, lse = merge_attention(*parts[0], *parts[1])
    whole = BlockLayout.from_mask(torch.ones(1, 1, 2, 3, dtype=torch.bool), 16, 16, 30, 48)
    expected, expected_lse = block_sparse_attention(q, k, v, whole, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_merge_of_nothing_with_nothing():
    nothing = torch.zeros(1, 1, 3, 4), torch.full((1, 1, 3), float("-inf"))
    out, lse = merge_attention(*nothing, *nothing)
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_a_mean_weighs_as_many_keys_as_it_stands_for():
    key, value = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    q = torch.randn(1, 1, 4, 8)
    k, v = key.expand(1, 1, 12, 8), value.expand(1, 1, 12, 8)  # twelve equal keys
    means, counts = pool_blocks(k, uniform_bounds(12, 12))
    pairs = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    out, lse = pooled_attention(
        q,
        means,
        pool_blocks(v, uniform_bounds(12, 12))[0],
        counts.log(),
        pairs=pairs,
        query_bounds=uniform_bounds(4, 4),
    )
    dense = BlockLayout.from_mask(pairs, 4, 12, 4, 12)
    expected, expected_lse = block_sparse_attention(q, k, v, dense, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_mask_survives_the_round_trip(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    q_len, k_len = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    block_q, block_k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    mask = torch.rand(batch, heads, -(-q_len // block_q), -(-k_len // block_k)) < data.draw(st.floats(0, 1))
    layout = BlockLayout.from_mask(mask, block_q, block_k, q_len, k_len)
    assert torch.equal(layout.mask(), mask)
    assert torch.equal(dropped_of(layout), ~mask)
    kept = layout.token_mask(batch, heads).double().mean().item()
    assert layout.density() == pytest.approx(kept, abs=1e-9)
