"""The kernels as operators: compiled in one graph, never waiting for the device, at 64-bit addresses."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pointillist.kernels import (
    BlockLayout,
    attention_with_pooled_tail,
    block_masses,
    block_sparse_attention,
    k_means,
    linear_attention,
    pooled_attention,
    top_k,
    top_p,
)
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
            return out + attention_with_pooled_tail(q, k, v, layout) * 2

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


class NoWaiting(TorchDispatchMode):
    """Raises at every operation that has to know what the device computed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        to_host = name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu")
        if to_host or name in ("_local_scalar_dense", "nonzero", "unique_dim", "masked_select", "equal", "is_nonzero"):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device():
    """On tensors that have shapes and no values: whoever asks for a value, or a size that depends on one, fails."""
    with FakeTensorMode(allow_non_fake_inputs=False), NoWaiting():
        out, masses = one_step()
    assert out.shape == (2, 2, 256, 64) and masses.shape == (2, 2, 4, 4)


def test_launching_never_waits_for_the_device(monkeypatch):
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
        with NoWaiting():
            for each in (layout, varying):
                block_sparse.attention(q, k, v, each, 0.1)
                block_sparse.attention(q, k, v, each, 0.1, query_blocks=torch.tensor([0, 2]))
            masses_file.block_masses(q, k, torch.zeros(2, 2, 256), bounds, bounds, None, 0.1)
            permute.permute(q, order, False)
            pooling.pool_blocks(q, bounds, None)
            nearest.nearest(q, k)
            linear.apply(q, *linear.states_of(k, v, bounds, None), bounds, torch.float32)


def test_addresses_beyond_32_bits():
    """Batch entries more than 2³¹ elements apart, in memory that is never touched in between."""
    distance = 2**31 + 64
    q, k, v = (
        torch.empty(distance + 40 * 16, dtype=torch.bfloat16).as_strided((2, 1, 40, 16), (distance, 640, 16, 1))
        for _ in range(3)
    )
    for x in (q, k, v):
        x.copy_(torch.randn(2, 1, 40, 16))
    layout = BlockLayout.from_mask(torch.rand(2, 1, 3, 3) < 0.6, 16, 16, 40, 40)
    far = block_sparse_attention(q, k, v, layout, backend="triton")
    near = block_sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout, backend="triton")
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
