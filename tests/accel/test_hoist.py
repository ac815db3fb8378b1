"""An order of tokens hoisted to the transformer's entry changes nothing but the cost."""

from dataclasses import replace

import pytest
import torch

from conftest import make_pipe, make_transformer
from pattern_checks import laid_out, make_call, video_mask
from pointillist import Plan, PlanError, accelerate
from pointillist.accel.blocks import BLOCK_ORDERS, blocks_in
from pointillist.accel.patterns import pattern_class

PLAN = Plan.uniform("pooled", 0.4, block=16)


@pytest.mark.parametrize("hoist", ["frames", "gilbert", "wth"])
@pytest.mark.parametrize("name", ["pooled", "window", "semantic", "reorder", "grid"])
def test_the_output_is_that_without_hoisting(pipe, run, name, hoist):
    plan = Plan.uniform(name, 0.4, block=16)
    with accelerate(pipe, plan):
        plain = run(pipe, size=96, steps=3)
    with accelerate(pipe, replace(plan, hoist=hoist, dense_first_frame=False)):
        torch.testing.assert_close(run(pipe, size=96, steps=3), plain, atol=2e-3, rtol=1e-3)
    with accelerate(pipe, replace(plan, dense_first_frame=True)):
        first = run(pipe, size=96, steps=3)
    with accelerate(pipe, replace(plan, hoist=hoist, dense_first_frame=True)):
        torch.testing.assert_close(run(pipe, size=96, steps=3), first, atol=2e-3, rtol=1e-3)
    assert not torch.equal(first, plain)


@pytest.mark.parametrize("stride", [5, 8, 12])
def test_blocks_of_another_size_are_another_order(stride):
    """`antidiagonal` cuts blocks to a multiple of its stride: then `frames` is not the hoisted `frames`."""
    call = make_call((3, 10, 11), block=32, smooth=2)
    pattern = pattern_class("antidiagonal")(0.3, order="frames", stride=stride)
    order = blocks_in("frames", call.grid, call.block, call.device).order[0, 0]
    moved = replace(call, **{name: getattr(call, name)[:, :, order] for name in "qkv"}, hoist="frames", memory={})
    plain, laid = (laid_out(pattern, each) for each in (call, moved))
    assert torch.equal(video_mask(laid, moved), video_mask(plain, call)[:, :, order][..., order])


@pytest.mark.parametrize("hoist", BLOCK_ORDERS)
def test_layouts_name_tokens_as_they_lie(hoist):
    """The same q and k in another order give the same pairs."""
    call = make_call((3, 6, 7), smooth=2)
    order = blocks_in(hoist, call.grid, call.block, call.device).order[0, 0]
    moved = replace(call, **{name: getattr(call, name)[:, :, order] for name in "qkv"}, hoist=hoist, memory={})
    for name in ("pooled", "diagonal"):
        pattern = pattern_class(name).at_density(0.3, call.grid, block=call.block)
        plain, laid = (laid_out(pattern, each) for each in (call, moved))
        assert torch.equal(video_mask(laid, moved), video_mask(plain, call)[:, :, order][..., order])
        natural = laid.layout.query_order is None
        assert natural == (pattern.order == hoist)


def test_a_timestep_for_every_token_is_hoisted_too():
    """As in Wan 2.2 TI2V: then the embedding of the timestep belongs to a token."""
    transformer = make_transformer()
    grid = (3, 6, 8)
    x = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2])
    timestep = torch.linspace(100, 900, 144)[None]
    text = torch.randn(1, 5, 32)
    pipe = make_pipe(transformer=transformer)
    outputs = []
    for hoist in ("", "hilbert"):
        with accelerate(pipe, replace(PLAN, hoist=hoist)), torch.no_grad():
            outputs.append(transformer(x, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0])
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)


def test_restore_takes_the_hooks_away(pipe, run):
    dense = run(pipe)
    accelerate(pipe, replace(PLAN, hoist="gilbert")).restore()
    assert torch.equal(run(pipe), dense)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.transformer.modules())


def test_what_cannot_be_hoisted_is_refused():
    with pytest.raises(PlanError, match="allowed are tiles, frames"):
        replace(PLAN, hoist="spiral")
    with pytest.raises(PlanError, match="hoist must be empty"):
        replace(Plan.uniform("sla", 0.3), hoist="tiles")
