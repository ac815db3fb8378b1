"""Every backend against the definition in float64, by FlashAttention's rule."""

import pytest
import torch

from pointillist.kernels import (
    BlockLayout,
    attention_with_pooled_tail,
    block_sparse_attention,
    choose_backend,
    uniform_bounds,
)
from pointillist.kernels import reference as definition

pytestmark = pytest.mark.usefixtures("cpu_kernel")
BACKENDS = ["reference", "cpu", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(batch, heads, q_len, k_len, head_dim, dtype, transposed=False):
    """Fresh random q, k, v; `transposed` gives the strides that Diffusers' [B, S, H, D] has."""
    if transposed:
        return tuple(torch.randn(batch, n, heads, head_dim).to(dtype).transpose(1, 2) for n in (q_len, k_len, k_len))
    return tuple(torch.randn(batch, heads, n, head_dim).to(dtype) for n in (q_len, k_len, k_len))


def random_mask(batch, heads, rows, columns, density=0.4):
    return torch.rand(batch, heads, rows, columns) < density


def dense_attention(q, k, v, mask, scale):
    """As tensor cores do it: scores summed in float32, probabilities rounded to the inputs' dtype."""
    scores = (q.float() @ k.float().transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0)  # of rows that see nothing: torch's bfloat16 product spreads their NaN
    return weights.to(v.dtype) @ v


def assert_within_rule(actual, q, k, v, layout, scale=None):
    """Error against float64 at most twice that of dense attention in the same dtype under the same mask.

    Several batch entries and heads make it sure: the largest of few errors is a matter of luck, for either.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact, exact_lse = definition.attention(q.double(), k.double(), v.double(), layout, scale)
    mask = layout.token_mask(*q.shape[:2])
    plain = dense_attention(q, k, v, mask, scale)
    out, lse = actual
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    rounded = exact.to(q.dtype)
    slack = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max()  # as FlashAttention's tests have it: rounding of the result
    allowed = 2 * (plain.double() - exact)[seen].abs().max() + slack
    assert (out.double() - exact)[seen].abs().max() <= allowed
    assert (lse.double() - exact_lse)[seen].abs().max() <= 1e-4
    assert (out[~seen] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",  # batch, heads, q_len, k_len, head_dim, block_q, block_k
    [
        (1, 2, 96, 96, 64, 32, 32),
        (2, 3, 70, 130, 40, 32, 48),
        (1, 2, 33, 17, 128, 16, 16),
        (2, 1, 150, 65, 64, 128, 64),
    ],
    ids=lambda s: "x".join(map(str, s)),
)
def test_error_within_flash_attentions_rule(backend, dtype, shape):
    batch, heads, q_len, k_len, head_dim, block_q, block_k = shape
    q, k, v = draw(batch, heads, q_len, k_len, head_dim, dtype, transposed=True)
    mask = random_mask(batch, heads, -(-q_len // block_q), -(-k_len // block_k))
    mask[0, 0, 0] = False  # a row that sees nothing
    mask[-1, -1, -1] = True
    layout = BlockLayout.from_mask(mask, block_q, block_k, q_len, k_len)
    assert_within_rule(block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend), q, k, v, layout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    q, k, v = (torch.randn(4, 4, 64, 70).transpose(2, 3) for _ in range(3))
    layout = BlockLayout.from_mask(random_mask(4, 4, 3, 3, 0.6), 32, 32, 70, 70)
    assert_within_rule(block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend), q, k, v, layout)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_outputs_are_written_everywhere(backend, monkeypatch):
    """Memory that is handed out full of NaN shows through wherever a backend forgets a place."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        memory = empty(*args, **kwargs)
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory

    q, k, v = draw(4, 4, 70, 50, 32, torch.float32)
    mask = random_mask(4, 4, 5, 4)
    mask[0, 1, 2] = False
    layout = BlockLayout.from_mask(mask, 16, 16, 70, 50, query_order=torch.randperm(70)[None, None])
    monkeypatch.setattr(torch, "empty", poisoned)
    actual = block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend)
    monkeypatch.undo()
    assert_within_rule(actual, q, k, v, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per head"])
def test_token_orders(backend, shared):
    q, k, v = draw(2, 2, 50, 70, 32, torch.float32)
    heads = (1, 1) if shared else (2, 2)
    query_order = torch.stack([torch.randperm(50) for _ in range(heads[0] * heads[1])]).view(*heads, 50)
    key_order = torch.stack([torch.randperm(70) for _ in range(heads[0] * heads[1])]).view(*heads, 70)
    layout = BlockLayout.from_mask(
        random_mask(2, 2, 4, 5), 16, 16, 50, 70, query_order=query_order, key_order=key_order
    )
    assert_within_rule(block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend), q, k, v, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ordered", [False, True])
def test_padding_is_never_seen(backend, ordered):
    q, k, v = draw(2, 2, 40, 60, 32, torch.float32)
    lengths = torch.tensor([60, 21])
    k[1, :, 21:], v[1, :, 21:] = float("nan"), float("nan")
    layout = BlockLayout.from_mask(
        torch.ones(1, 1, 3, 4, dtype=torch.bool), 16, 16, 40, 60,
        key_order=torch.randperm(60)[None, None] if ordered else None, key_lengths=lengths,
    )  # fmt: skip
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend)
    alone = torch.nn.functional.scaled_dot_product_attention(q[1:], k[1:, :, :21], v[1:, :, :21])
    torch.testing.assert_close(out[1:], alone)
    assert out.isfinite().all() and lse.isfinite().all()
    tailed = attention_with_pooled_tail(q, k, v, layout, backend=backend)
    torch.testing.assert_close(tailed[1:], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_varying_size(backend):
    q, k, v = draw(4, 4, 45, 61, 32, torch.float32)
    query_bounds = torch.tensor([0, 3, 20, 45], dtype=torch.int32)
    key_bounds = torch.tensor([0, 1, 18, 18, 50, 61], dtype=torch.int32)  # one block is empty
    layout = BlockLayout.from_bounds(random_mask(4, 4, 3, 5, 0.6), query_bounds, key_bounds, 45, 61)
    assert_within_rule(block_sparse_attention(q, k, v, layout, return_lse=True, backend=backend), q, k, v, layout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_kept_is_dense_attention(backend):
    q, k, v = draw(1, 2, 77, 77, 64, torch.float32)
    layout = BlockLayout.from_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 32, 32, 77, 77)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout, scale=0.3, backend=backend), dense)


def test_cpu_backend_on_several_threads_equals_one():
    q, k, v = draw(2, 3, 130, 130, 32, torch.float32)
    layout = BlockLayout.from_mask(random_mask(2, 3, 9, 9), 16, 16, 130, 130)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = block_sparse_attention(q, k, v, layout, backend="cpu")
        torch.set_num_threads(2)
        together = block_sparse_attention(q, k, v, layout, backend="cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_wrong_arguments_are_refused_with_their_values():
    q, k, v = draw(1, 2, 32, 32, 16, torch.float32)
    layout = BlockLayout.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, 16, 32, 32)
    with pytest.raises(ValueError, match="32 queries and 32 keys; q and k have 31"):
        block_sparse_attention(q[:, :, :31], k, v, layout)
    with pytest.raises(ValueError, match="one and the same dtype of float16"):
        block_sparse_attention(q.half(), k, v, layout)
    with pytest.raises(ValueError, match="'cuda' is unknown; allowed are auto, reference, cpu, triton"):
        choose_backend("cpu", "cuda")
    with pytest.raises(ValueError, match=r"\[B\|1, H\|1, 2, 3\]"):
        BlockLayout.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, 16, 32, 48)


def test_uniform_bounds_end_with_a_short_block():
    assert uniform_bounds(70, 32).tolist() == [0, 32, 64, 70]
    assert uniform_bounds(64, 32).tolist() == [0, 32, 64]
