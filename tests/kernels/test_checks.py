"""Arguments that do not fit are refused in a sentence with their values, on every backend, before anything runs."""

from dataclasses import replace

import pytest
import torch

from pointillist.kernels import (
    BlockLayout,
    Means,
    above,
    attention_with_pooled_tail,
    available_backends,
    block_masses,
    block_sparse_attention,
    choose_backend,
    k_means,
    linear_attention,
    means_of,
    merge_attention,
    top_k,
    top_p,
)

Q, K, V = (torch.randn(2, 3, 64, 16) for _ in range(3))
LAYOUT = BlockLayout.from_mask(torch.rand(2, 3, 4, 4) < 0.6, 16, 16, 64, 64)
BOUNDS = torch.tensor([0, 16, 32, 48, 64], dtype=torch.int32)
WHOLE = torch.ones(1, 1, 4, 4, dtype=torch.bool)
META = torch.device("meta")


def ints(*values):
    return torch.tensor([[values]], dtype=torch.int32)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(q=Q[0]), r"must be \[B, H, Sq, D\]"),
        (dict(k=K[0], v=V[0]), r"must be \[B, H, Sq, D\]"),
        (dict(k=K[:, :1], v=V[:, :1]), r"k \(2, 1, 64, 16\)"),
        (dict(q=Q[..., :0], k=K[..., :0], v=V[..., :0]), "must not be empty"),
        (dict(q=Q.int(), k=K.int(), v=V.int()), "one and the same dtype"),
        (dict(k=K.half()), "one and the same dtype"),
        (dict(q=Q.numpy()), "q is a ndarray; it must be a tensor"),
        (dict(layout=WHOLE), "the layout is a Tensor; it must be a BlockLayout"),
        (dict(k=K.to(META), v=V.to(META)), "k is on meta; q is on cpu"),
        (dict(layout=replace(LAYOUT, indptr=LAYOUT.indptr.to(META))), "the layout's indptr is on meta"),
        (dict(query_blocks=torch.tensor([0], device=META)), "query_blocks is on meta"),
        (dict(query_blocks=torch.tensor([0, 4])), "query_blocks run from 0 to 4; allowed are 0 to 3"),
        (dict(query_blocks=torch.tensor([-1])), "query_blocks run from -1"),
        (dict(query_blocks=torch.tensor([0], dtype=torch.int32)), r"it must be an int64 tensor \[n\]"),
        (dict(query_blocks=[0]), "query_blocks is a list"),
        (dict(scale=0.0), "scale is 0.0"),
        (dict(scale=float("nan")), "scale is nan"),
        (dict(scale="1"), "scale is '1'"),
        (dict(quantized="int2"), "quantized is 'int2'; allowed are none, int8, int8_fp8"),
        (dict(layout=replace(LAYOUT, columns=LAYOUT.columns + 4)), "columns run from 4 to 7; allowed are 0 to 3"),
        (dict(layout=replace(LAYOUT, columns=LAYOUT.columns.long())), "columns is torch.int64; it must be torch.int32"),
        (dict(layout=replace(LAYOUT, columns=LAYOUT.columns[:3])), "holds 3; `pairs` was too small"),
        (dict(layout=replace(LAYOUT, query_bounds=ints(0, 16, 32, 48, 60))), "query_bounds run from .* to 64"),
        (dict(layout=replace(LAYOUT, key_bounds=ints(0, 32, 16, 48, 64))), "key_bounds run from .* to 64"),
        (dict(layout=replace(LAYOUT, key_bounds=ints(0, 40, 41, 48, 64))), "a block of 40, above the largest promised"),
        (dict(layout=replace(LAYOUT, key_lengths=torch.tensor([64, 65]))), r"key_lengths are \[64, 65\]"),
        (dict(layout=replace(LAYOUT, key_lengths=torch.tensor([1.5, 2]))), "key_lengths is torch.float32"),
        (dict(layout=replace(LAYOUT, key_lengths=torch.tensor([64]))), r"a batch of 2 needs \(2,\)"),
        (dict(layout=replace(LAYOUT, query_order=torch.zeros(1, 1, 64).long())), "query_order is no permutation"),
        (dict(layout=replace(LAYOUT, key_order=torch.arange(1, 65)[None, None])), "key_order is no permutation"),
        (dict(layout=replace(LAYOUT, key_order=torch.arange(64).expand(5, 1, 64))), "key_order is for batch and heads"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_attention_refuses(backend, changes, sentence):
    call = {**dict(q=Q, k=K, v=V, layout=LAYOUT), **changes}
    with pytest.raises((ValueError, TypeError), match=sentence):
        block_sparse_attention(**call, backend=backend)


@pytest.mark.parametrize(
    "changes",
    [
        dict(keys=K[:, :, :3]), dict(values=V.half()), dict(pairs=torch.ones(1, 1, 3, 4, dtype=torch.bool)),
        dict(pairs=torch.ones(1, 1, 4, 4)), dict(log_counts=torch.zeros(4)),
    ],
    ids=lambda x: "-".join(x),
)  # fmt: skip
def test_means_that_do_not_fit_are_refused(changes):
    fitting = means_of(K, V, LAYOUT)
    with pytest.raises(ValueError, match="the means are keys"):
        attention_with_pooled_tail(Q, K, V, LAYOUT, means=replace(fitting, **changes))
    moved = Means(*(x.to(META) for x in (fitting.keys, fitting.values, fitting.log_counts, fitting.pairs)))
    with pytest.raises(ValueError, match=r"means\.keys is on meta"):
        attention_with_pooled_tail(Q, K, V, LAYOUT, means=moved)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_the_other_primitives_refuse(backend):
    lse = torch.zeros(2, 3, 64)
    for wrong in (lse[..., :63], lse[:, :1], lse.to(META), lse.int()):
        with pytest.raises(ValueError, match="lse is"):
            block_masses(Q, K, wrong, LAYOUT, backend=backend)
    for wrong in (WHOLE[..., :2], WHOLE.float(), WHOLE.to(META), WHOLE.expand(5, 1, 4, 4)):
        with pytest.raises(ValueError, match="pairs is"):
            linear_attention(Q, K, V, torch.relu, LAYOUT, pairs=wrong, backend=backend)


def test_helpers_refuse():
    scores = torch.randn(1, 2, 3, 8)
    for wrong in (0, 9, -1, 2.5, torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="a whole number from 1 to 8"):
            top_k(scores, wrong)
    for wrong in (dict(p=0.0), dict(p=1.1), dict(p=float("nan")), dict(p=0.5, at_least=0), dict(p=0.5, at_least=9)):
        with pytest.raises(ValueError, match=r"allowed are \(0, 1\] and 1 to 8"):
            top_p(scores.softmax(-1), **wrong)
    for wrong in (
        dict(x=Q[0], count=3), dict(x=Q.int(), count=3), dict(x=Q, count=65), dict(x=Q, count=2.5),
        dict(x=Q, count=3, centroids=Q[:, :, :4]), dict(x=Q, count=3, lengths=torch.tensor([4])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"it must be|allowed are|they must be|needs"):
            k_means(**wrong)
    with pytest.raises(ValueError, match="in one floating dtype"):
        merge_attention(Q, Q[..., 0], Q.half(), Q[..., 0])
    with pytest.raises(ValueError, match="in one floating dtype"):
        merge_attention(Q, Q[..., 0], Q, Q[..., :32, 0])


def test_low_precision_masses_reach_the_share():
    masses = torch.rand(1, 1, 4, 2000).to(torch.bfloat16)
    share = (masses.float() * top_p(masses, 0.9)).sum(-1) / masses.float().sum(-1)
    assert (share >= 0.9).all() and top_p(masses, 1.0).sum() == (masses > 0).sum()
    assert above(masses, 1.0).any(-1).all()


@pytest.mark.parametrize("device", ["meta", "mps", "cuda"])
def test_triton_is_for_cuda_devices_that_are_there(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert available_backends(device)["triton"]
    assert choose_backend(device)[0] == "reference"


def test_padding_moves_no_cluster():
    x, lengths = torch.randn(2, 2, 50, 8), torch.tensor([50, 31])
    poisoned = x.clone()
    poisoned[1, :, 31:] = float("nan")
    clusters = k_means(poisoned, 4, iterations=3, lengths=lengths)
    assert clusters.centroids.isfinite().all()
    assert (clusters.order[1, :, 31:] >= 31).all() and (clusters.bounds[..., -1] == 50).all()
    settled = k_means(poisoned, 4, iterations=40, lengths=lengths).centroids[1]
    labels = torch.cdist(x[1, :, :31], settled).argmin(-1)
    means = torch.stack([torch.stack([x[1, h, :31][labels[h] == c].mean(0) for c in range(4)]) for h in range(2)])
    torch.testing.assert_close(means, settled, atol=1e-5, rtol=1e-5)  # Lloyd's fixed point, of valid tokens only


def test_merging_in_half_precision_loses_one_rounding():
    out_a, out_b = torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 16)
    lse_a, lse_b = torch.randn(1, 2, 400), torch.randn(1, 2, 400)
    for dtype in (torch.float16, torch.bfloat16):
        halves = out_a.to(dtype), out_b.to(dtype)
        exact, _ = merge_attention(halves[0].double(), lse_a.double(), halves[1].double(), lse_b.double())
        merged, _ = merge_attention(halves[0], lse_a, halves[1], lse_b)
        rounding = (exact.to(dtype).double() - exact).abs().max()
        assert merged.dtype == dtype and (merged.double() - exact).abs().max() <= 1.01 * rounding + 1e-6
