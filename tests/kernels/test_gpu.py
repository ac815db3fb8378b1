"""The kernels compiled and run on a GPU, at real sizes: `pytest -m gpu tests/kernels/test_gpu.py`.

Skipped where there is none. Not with TRITON_INTERPRET=1, which interprets everything.
"""

import os

import pytest
import torch

from pointillist.kernels import (
    BlockLayout,
    attention_with_pooled_tail,
    block_masses,
    block_sparse_attention,
    k_means,
    linear_attention,
    reference,
    top_k,
    top_p,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets: unset it"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def within_rule(out, exact, plain):
    """FlashAttention's rule: at most twice the error of attention in the same dtype."""
    rounded = exact.to(out.dtype)
    slack = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max()
    return (out.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + slack


def plain_attention(q, k, v, layout):
    mask = layout.token_mask(*q.shape[:2])
    scores = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num(0).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("length", [1024, 1000])
def test_attention(dtype, head_dim, block, length):
    q, k, v = (torch.randn(2, length, 3, head_dim, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
    blocks = -(-length // block)
    mask = torch.rand(2, 3, blocks, blocks, device="cuda") < 0.4
    mask[0, 0, 0] = False
    orders = dict(query_order=torch.rand(2, 3, length, device="cuda").argsort(-1)) if block == 64 else {}
    layout = BlockLayout.from_mask(mask, block, block, length, length, **orders)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), layout, head_dim**-0.5)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="triton")
    assert within_rule(out, exact, plain_attention(q, k, v, layout))
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen) and (lse - exact_lse)[seen].abs().max() < 1e-3
    again = block_sparse_attention(q, k, v, layout, backend="triton")
    assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_clusters_tail_and_int8(dtype, head_dim):
    q, k, v = (torch.randn(1, 4, 3000, head_dim, device="cuda", dtype=dtype) for _ in range(3))
    queries, keys = k_means(q, 12, iterations=2), k_means(k, 30, iterations=2)
    mask = top_p(torch.rand(1, 4, 12, 30, device="cuda"), 0.5)
    layout = BlockLayout.from_bounds(
        mask,
        queries.bounds,
        keys.bounds,
        3000,
        3000,
        pairs=4 * 12 * 30,
        query_order=queries.order,
        key_order=keys.order,
    )
    exact, _ = reference.attention(q.double(), k.double(), v.double(), layout, head_dim**-0.5)
    plain = plain_attention(q, k, v, layout)
    assert within_rule(block_sparse_attention(q, k, v, layout), exact, plain)
    rounded = block_sparse_attention(q, k, v, layout, quantized="int8")
    assert (rounded.double() - exact).norm() < 0.05 * exact.norm()
    tailed = attention_with_pooled_tail(q, k, v, layout)
    expected = attention_with_pooled_tail(q.double(), k.double(), v.double(), layout, backend="reference")
    assert (tailed.double() - expected).norm() < 0.02 * expected.norm()


def test_masses_and_linear_attention():
    q, k, v = (torch.randn(1, 2, 1000, 64, device="cuda") for _ in range(3))
    layout = BlockLayout.from_mask(torch.rand(1, 2, 8, 8, device="cuda") < 0.5, 128, 128, 1000, 1000)
    lse = (q @ k.mT / 8).logsumexp(-1)
    torch.testing.assert_close(
        block_masses(q, k, lse, layout), block_masses(q, k, lse, layout, backend="reference"), atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(
        linear_attention(q, k, v, torch.relu, layout),
        linear_attention(q, k, v, torch.relu, layout, backend="reference"), atol=1e-3, rtol=1e-3,
    )  # fmt: skip


def test_a_step_makes_no_synchronisation():
    q, k, v = (torch.randn(1, 4, 4096, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    scores = torch.rand(1, 4, 32, 32, device="cuda")

    def step():
        layout = BlockLayout.from_mask(top_k(scores, 8), 128, 128, 4096, 4096, pairs=4 * 32 * 8)
        return attention_with_pooled_tail(q, k, v, layout)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_linear_in_the_length():
    length = 65536
    q, k, v = (torch.randn(1, 4, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = top_k(torch.rand(1, 4, 512, 512, device="cuda"), 64)
    layout = BlockLayout.from_mask(mask, 128, 128, length, length, pairs=4 * 512 * 64)
    block_sparse_attention(q, k, v, layout)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block_sparse_attention(q, k, v, layout)
    inputs = q.numel() * q.element_size()
    assert torch.cuda.max_memory_allocated() - before <= 2 * inputs  # out and lse
