"""The kernels as operators: compiled in one graph, never waiting for the device, at 64-bit addresses."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton has no build for this platform")

from pointillist.kernels import (
    BlockLayout,
    attention_with_pooled_tail,
    block_masses,
    block_sparse_attention,
    k_means,
    linear_attention,
    means_of,
    pooled_attention,
    top_k,
    top_p,
)
from pointillist.kernels.quantization import quantize
from pointillist.kernels.triton.worklist import work_of


def test_a_model_compiles_into_one_graph():
    layout = BlockLayout.from_mask(torch.rand(1, 2, 4, 4) < 0.6, 16, 16, 64, 64)
    graphs = Counter()

    def counting(graph, inputs):
        graphs["made"] += 1
        return graph

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            out = block_sparse_attention(q * 1.5, k, v, layout)
            out = out + linear_attention(q, k, v, torch.relu, layout)
            clusters = k_means(k, 3, iterations=1)
            return out + attention_with_pooled_tail(q, k, v, layout) * 2 + clusters.centroids.mean()

    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    torch.testing.assert_close(compiled(q, k, v), model(q, k, v))
    torch.testing.assert_close(compiled(k, q, v), model(k, q, v))
    assert graphs["made"] == 1


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_the_operator_is_what_it_declares(backend):
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    layout = BlockLayout.from_mask(torch.rand(1, 2, 3, 3) < 0.6, 16, 16, 40, 40)
    torch.library.opcheck(
        torch.ops.pointillist.attention.default,
        (q, k, v, layout.query_bounds, layout.key_bounds, layout.indptr, layout.columns, 16, 16, True, None, None, None,
         None, None, None, None, None, 0.25, backend, "none"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def one_step():
    """What a step does, as patterns will have it: select, lay out, attend, with all the helpers."""
    on = dict(backend="triton")
    q, k, v = (torch.randn(2, 2, 256, 64) for _ in range(3))
    order = torch.rand(1, 1, 256).argsort(-1)
    kept = top_k(torch.rand(2, 2, 4, 4), 2)
    layout = BlockLayout.from_mask(kept, 64, 64, 256, 256, pairs=32, query_order=order, key_order=order)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, **on)
    attention_with_pooled_tail(q, k, v, layout, **on)
    block_sparse_attention(q, k, v, layout, quantized="int8", query_blocks=torch.arange(2), **on)
    linear_attention(q, k, v, torch.relu, layout, **on)
    masses = block_masses(q, k, lse, layout, **on)
    queries, keys = k_means(q, 5, iterations=2), k_means(k, 7, iterations=2, centroids=k[:, :, :7])
    pairs = top_p(torch.rand(2, 2, 5, 7), 0.6)
    clustered = BlockLayout.from_bounds(
        pairs, queries.bounds, keys.bounds, 256, 256, pairs=2 * 2 * 5 * 7,
        query_order=queries.order, key_order=keys.order,
    )  # fmt: skip
    attention_with_pooled_tail(q, k, v, clustered, **on)
    counts = torch.zeros(1, 1, 7)
    pooled_attention(q, keys.centroids, keys.centroids, counts, pairs=pairs, query_bounds=queries.bounds, **on)
    return out, masses


WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "index_bool", "repeat_interleave_of_tensor",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Raises at every operation that has to know what the device computed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "index" and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            name = "index_bool"
        if (
            name == "repeat_interleave"
            and (kwargs or {}).get("output_size") is None
            and function._overloadname != "self_int"
        ):
            name = "repeat_interleave_of_tensor"
        to_host = name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu")
        if to_host or name in WAITS:
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_reading(monkeypatch):
    """The ways to a tensor's values that no dispatch mode sees."""
    for name in ("tolist", "cpu", "numpy"):

        def refuse(self, *args, _name=name, **kwargs):
            raise AssertionError(f"{_name}() waits for the device")

        monkeypatch.setattr(torch.Tensor, name, refuse)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.numpy(), lambda x: x.nonzero(),
        lambda x: x[x > 0], lambda x: x.unique(), lambda x: x.bincount(), lambda x: bool(x), lambda x: int(x),
        lambda x: x.repeat_interleave(x),
    ],
)  # fmt: skip
def test_waiting_is_seen(wait, no_reading):
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        wait(torch.ones(1, dtype=torch.int64))


def test_a_step_never_waits_for_the_device(no_reading):
    """On tensors that have shapes and no values: whoever asks for a value, or a size that depends on one, fails."""
    with FakeTensorMode(allow_non_fake_inputs=False), NoWaiting():
        out, masses = one_step()
    assert out.shape == (2, 2, 256, 64) and masses.shape == (2, 2, 4, 4)


def test_launching_never_waits_for_the_device(monkeypatch, no_reading):
    """What the operators hide from the test above: the code that prepares and makes the launches."""
    from triton.runtime.interpreter import InterpretedFunction

    from pointillist.kernels.triton import block_masses as masses_file
    from pointillist.kernels.triton import block_sparse, linear, nearest, permute, pooling

    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *args, **kwargs: None)
    q, k, v = (torch.randn(2, 2, 256, 64) for _ in range(3))
    order = torch.stack([torch.randperm(256)])[None]
    for key_lengths in (None, torch.tensor([256, 100])):
        layout = BlockLayout.from_mask(
            torch.rand(2, 2, 4, 4) < 0.5, 64, 64, 256, 256, pairs=64, query_order=order, key_order=order,
            key_lengths=key_lengths,
        )  # fmt: skip
        bounds = layout.key_bounds.expand(2, 2, -1).contiguous()
        varying = BlockLayout.from_bounds(torch.rand(2, 2, 4, 4) < 0.5, bounds, bounds, 256, 256, pairs=64)
        rounded = quantize(q, k, layout, v)
        means = means_of(k, v, layout)
        with NoWaiting():
            for each in (layout, varying):
                block_sparse.attention(q, k, v, each, 0.1)
                block_sparse.attention(q, k, v, each, 0.1, means)
                block_sparse.attention(q, k, v, each, 0.1, None, torch.tensor([0, 2]), rounded)
            # an operator's body is hidden from a dispatch mode, so the bodies are called
            masses_file.block_masses._init_fn(q, k, torch.zeros(2, 2, 256), bounds, bounds, None, 0.1)
            permute.permute._init_fn(q, order, False)
            pooling.pool_blocks._init_fn(q, bounds, None)
            nearest.nearest._init_fn(q, k)
            states = linear.states_of._init_fn(k, v, bounds, None)
            linear.apply._init_fn(q, *states, bounds, torch.float32)
            quantize(q, k, layout, v)
            means_of(k, v, layout)


@pytest.mark.parametrize("axis", ["head", "token"])
def test_addresses_beyond_32_bits(axis):
    """A stride below 2³¹ times a number that takes it beyond, in memory that is never touched in between."""
    heads, length = (3, 40) if axis == "head" else (1, 200)
    head, token = (2**30 + 64, 16) if axis == "head" else (16, 2**24)
    memory = torch.empty(3 * 2**30 + 2**22 if axis == "head" else length * token + 2**22, dtype=torch.bfloat16)
    q, k, v = (memory.as_strided((1, heads, length, 16), (0, head, token, 1), i * 2**20) for i in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(1, heads, length, 16))
    blocks = -(-length // 16)
    layout = BlockLayout.from_mask(torch.rand(1, heads, blocks, blocks) < 0.6, 16, 16, length, length)
    near_q, near_k, near_v = (x.contiguous() for x in (q, k, v))
    far = block_sparse_attention(q, k, v, layout, backend="triton")
    near = block_sparse_attention(near_q, near_k, near_v, layout, backend="triton")
    assert torch.equal(far, near)


@pytest.mark.parametrize("uniform", [True, False])
def test_work_covers_every_query_once_and_longest_lists_come_first(uniform):
    bounds = torch.tensor([[[0, 10, 10, 100, 130]], [[0, 60, 70, 80, 130]]], dtype=torch.int32)[:, [0, 0, 0]]
    mask = torch.rand(2, 3, 4, 4) < 0.5
    mask[1, 2] = True
    layout = (
        BlockLayout.from_mask(mask, 33, 33, 130, 130)
        if uniform
        else BlockLayout.from_bounds(mask, bounds, bounds, 130, 130)
    )
    work = work_of(layout, 2, 3, 32, 16)
    assert work is work_of(layout, 2, 3, 32, 16)  # a static layout pays once
    seen, lengths = torch.zeros(6, 130, dtype=torch.int64), []
    key_bounds = layout.key_bounds.expand(2, 3, -1).reshape(6, -1)
    for head, first, last, begin, end, block in work.table.T.tolist():
        seen[head, first:last] += 1
        if first == last:
            continue
        lengths.append(end - begin)
        runs = [(int(word) >> 8, (int(word) & 255) + 1) for word in work.keys[begin:end]]
        places = [place for start, length in runs for place in range(start, start + length)]
        kept = mask.view(6, 4, 4)[head, block].nonzero()[:, 0]
        assert places == [p for j in kept for p in range(int(key_bounds[head, j]), int(key_bounds[head, j + 1]))]
        assert all(length <= 16 for _, length in runs)
    assert (seen == 1).all()
    assert lengths == sorted(lengths, reverse=True)


def test_a_cached_list_is_that_of_its_layout():
    """Two layouts may share parts, and parts may be written anew."""
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    mask = top_k(torch.rand(1, 2, 4, 4), 2)
    layout = BlockLayout.from_mask(mask, 16, 16, 64, 64)
    others = BlockLayout.from_mask(mask.roll(1, -1), 16, 16, 64, 64).columns
    moved = torch.tensor([[[0, 10, 30, 50, 64]]], dtype=torch.int32)

    def check(each):
        expected, actual = (block_sparse_attention(q, k, v, each, backend=name) for name in ("reference", "triton"))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    check(layout)
    check(replace(layout, columns=others))
    check(replace(layout, key_bounds=moved, query_bounds=moved, max_query_block=64, max_key_block=64, uniform=False))
    layout.columns.copy_(others)
    check(layout)


def test_a_query_block_may_be_named_twice():
    q, k, v = (torch.randn(1, 1, 200, 16) for _ in range(3))
    bounds = torch.tensor([0, 100, 200], dtype=torch.int32)
    layout = BlockLayout.from_bounds(torch.ones(1, 1, 2, 2, dtype=torch.bool), bounds, bounds, 200, 200)
    twice = block_sparse_attention(q, k, v, layout, backend="triton", query_blocks=torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(twice, block_sparse_attention(q, k, v, layout, backend="cpu"))
    none = block_sparse_attention(q, k, v, layout, query_blocks=torch.tensor([], dtype=torch.int64))
    assert (none == 0).all()


def test_lists_are_no_larger_than_promised():
    """120,000 tokens, 40 heads, density 0.25: 200 MB at most, of which a tenth is looked at here."""
    heads, blocks = 4, -(-120_000 // 128)
    kept = torch.rand(1, heads, blocks, blocks).topk(blocks // 4, -1).indices
    mask = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool).scatter_(-1, kept, True)
    layout = BlockLayout.from_mask(mask, 128, 128, 120_000, 120_000)
    work = work_of(layout, 1, heads, 128, 64)
    held = [layout.indptr, layout.columns, layout.query_bounds, layout.key_bounds, work.table, work.keys]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    assert sum(storages.values()) * 10 <= 200e6
