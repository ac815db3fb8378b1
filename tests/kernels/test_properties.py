"""What must hold of attention over block pairs whatever the blocks, for every backend."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointillist.kernels import (
    BlockLayout,
    attention_with_pooled_tail,
    block_sparse_attention,
    merge_attention,
)

pytestmark = pytest.mark.usefixtures("cpu_kernel")
BACKENDS = ["cpu", "triton"]
EXAMPLES = {"cpu": 40, "triton": 12}  # the interpreter takes milliseconds for a tile


@st.composite
def calls(draw):
    """q, k, v and a layout: blocks of any size, the same or their own in each head, orders, several heads."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([16, 24, 64]))
    uniform = draw(st.booleans())
    lengths = q_len, k_len = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    q, k, v = (torch.randn(batch, n, heads, head_dim).transpose(1, 2) for n in (q_len, k_len, k_len))
    orders = dict.fromkeys(("query_order", "key_order"))
    for name, length in zip(orders, lengths, strict=True):
        if draw(st.booleans()):
            orders[name] = torch.rand(batch, heads, length).argsort(-1)
    density = draw(st.floats(0, 1))
    if uniform:
        block_q, block_k = draw(st.sampled_from([8, 32, 64])), draw(st.sampled_from([16, 32, 64]))
        mask = torch.rand(batch, heads, -(-q_len // block_q), -(-k_len // block_k)) < density
        return q, k, v, mask, BlockLayout.from_mask(mask, block_q, block_k, q_len, k_len, **orders)
    blocks = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    own = (batch, heads) if draw(st.booleans()) else (1, 1)
    bounds = [
        torch.cat(
            [torch.zeros(*own, 1), torch.randint(n + 1, (*own, count - 1)).sort(-1)[0], torch.full((*own, 1), n)], -1
        )
        for n, count in zip(lengths, blocks, strict=True)
    ]
    mask = torch.rand(batch, heads, *blocks) < density
    return q, k, v, mask, BlockLayout.from_bounds(mask, *(b.int() for b in bounds), q_len, k_len, **orders)


def for_each_backend(test):
    """Run a test of (backend, data) often enough on each backend."""

    @pytest.mark.parametrize("backend", BACKENDS)
    def run(backend):
        @settings(max_examples=EXAMPLES[backend], deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def examples(data):
            test(backend, data)

        examples()

    run.__doc__ = test.__doc__
    return run


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@for_each_backend
def test_it_equals_the_definition(backend, data):
    q, k, v, _, layout = data.draw(calls())
    for expected, actual in zip(
        *(block_sparse_attention(q, k, v, layout, return_lse=True, backend=name) for name in ("reference", backend)),
        strict=True,
    ):
        assert_equal(actual, expected)
    expected, actual = (attention_with_pooled_tail(q, k, v, layout, backend=name) for name in ("reference", backend))
    assert_equal(actual, expected)


@for_each_backend
def test_density_one_is_dense_attention(backend, data):
    q, k, v, mask, layout = data.draw(calls())
    whole = BlockLayout.from_bounds(
        torch.ones_like(mask), layout.query_bounds, layout.key_bounds, layout.q_len, layout.k_len,
        query_order=layout.query_order, key_order=layout.key_order,
    )  # fmt: skip
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_equal(block_sparse_attention(q, k, v, whole, backend=backend), dense)
    assert_equal(attention_with_pooled_tail(q, k, v, whole, backend=backend), dense)


@for_each_backend
def test_keys_that_are_not_kept_may_hold_anything(backend, data):
    q, k, v, _, layout = data.draw(calls())
    expected = block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend)
    unseen = ~layout.token_mask(*q.shape[:2]).any(2)
    poison = data.draw(st.sampled_from([float("nan"), 1e30, float("inf")]))
    k, v = (x.masked_fill(unseen[..., None], poison) for x in (k, v))
    for one, other in zip(
        expected, block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend), strict=True
    ):
        assert torch.equal(one, other)


@for_each_backend
def test_the_order_of_kept_pairs_does_not_matter(backend, data):
    q, k, v, _, layout = data.draw(calls())
    columns, stops = layout.columns.clone(), layout.indptr.view(-1, layout.indptr.shape[-1]).tolist()
    for row in stops:
        for start, stop in itertools.pairwise(row):
            columns[start:stop] = columns[start:stop][torch.randperm(stop - start)]
    if layout.uniform and layout.k_len % layout.max_key_block:
        return  # the one rule: a short last block is a row's last
    shuffled = replace(layout, columns=columns, indptr=layout.indptr.clone())
    assert_equal(
        block_sparse_attention(q, k, v, shuffled, backend=backend),
        block_sparse_attention(q, k, v, layout, backend=backend),
    )


@for_each_backend
def test_permuting_there_and_back_changes_nothing(backend, data):
    """Tokens handed over in place order give the outputs in place order."""
    q, k, v, _, layout = data.draw(calls())
    batch, heads = q.shape[:2]
    plain = replace(layout, query_order=None, key_order=None)

    def moved(x, order):
        return x if order is None else x.gather(2, order.expand(batch, heads, -1)[..., None].expand_as(x))

    out = block_sparse_attention(q, k, v, layout, backend=backend)
    in_place = block_sparse_attention(
        moved(q, layout.query_order), moved(k, layout.key_order), moved(v, layout.key_order), plain, backend=backend
    )
    assert_equal(moved(out, layout.query_order), in_place)


@for_each_backend
def test_merging_any_split_is_the_whole(backend, data):
    q, k, v, mask, layout = data.draw(calls())

    def part(pairs):
        made = BlockLayout.from_bounds(
            pairs, layout.query_bounds, layout.key_bounds, layout.q_len, layout.k_len,
            query_order=layout.query_order, key_order=layout.key_order,
        )  # fmt: skip
        return block_sparse_attention(q, k, v, made, return_lse=True, backend=backend)

    some = torch.rand(mask.shape) < data.draw(st.floats(0, 1))
    out, lse = merge_attention(*part(mask & some), *part(mask & ~some))
    expected, expected_lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend)
    assert_equal(out, expected)
    assert_equal(lse, expected_lse)


@for_each_backend
def test_only_the_chosen_query_blocks_are_computed(backend, data):
    q, k, v, mask, layout = data.draw(calls())
    number = mask.shape[2]
    chosen = torch.randperm(number)[: data.draw(st.integers(1, number))]
    whole = block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend)
    some = block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend, query_blocks=chosen)
    block = layout.query_block_of_place(*q.shape[:2])
    if layout.query_order is not None:
        block = torch.empty_like(block).scatter_(2, layout.query_order, block)
    computed = torch.isin(block, chosen)
    assert_equal(some[0][computed], whole[0][computed])
    assert_equal(some[1][computed], whole[1][computed])
    assert (some[0][~computed] == 0).all() and (some[1][~computed] == float("-inf")).all()
