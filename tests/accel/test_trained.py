"""Trained tensors and the modules' inputs on their way to patterns, in a real, tiny Wan pipeline."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from conftest import make_pipe, make_transformer
from pointillist import AccelerateError, Plan, PlanError, accelerate
from pointillist.accel import bridge
from pointillist.accel.patterns.sla import Sla
from pointillist.accel.patterns.vsa import Vsa
from pointillist.accel.plan import Rule
from pointillist.accel.trained import check_keys, weights_of

SPARSE = {"tail": "none", "dense_steps": 1, "block": 16}


def gate_weights(pipe, value=None, prefix=""):
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    return {
        f"{prefix}blocks.{layer}.attn1.to_gate_compress.weight": torch.randn(width, width)
        if value is None
        else torch.full((width, width), value)
        for layer in range(2)
    }


def test_a_site_has_its_modules_tensors_and_over_them_the_given_ones():
    module = torch.nn.Linear(3, 3)
    assert weights_of(module, "transformer.blocks.1.attn1", {})["weight"] is module.weight
    given = {
        "blocks.1.attn1.bias": torch.ones(3),
        "transformer.blocks.1.attn1.proj_l.weight": torch.zeros(2, 2),
        "blocks.11.attn1.weight": torch.ones(1),
        "transformer_2.blocks.1.attn1.weight": torch.ones(2),
    }
    for name in ("transformer.blocks.1.attn1", "blocks.1.attn1"):
        weights = weights_of(module, name, given)
        assert set(weights) == {"weight", "bias", "proj_l.weight"}
        assert weights["weight"] is module.weight and torch.equal(weights["bias"], torch.ones(3))
    assert torch.equal(weights_of(module, "transformer_2.blocks.1.attn1", given)["weight"], torch.ones(2))
    check_keys(given, ["transformer.blocks.1.attn1", "transformer.blocks.11.attn1", "transformer_2.blocks.1.attn1"])
    with pytest.raises(ValueError, match="1 keys that fit no site: transformer_2"):
        check_keys(given, ["transformer.blocks.1.attn1", "transformer.blocks.11.attn1"])


@pytest.mark.parametrize("form", ["mapping", "file", "module"])
def test_weights_and_inputs_reach_the_pattern(pipe, run, tmp_path, monkeypatch, form):
    given, seen, inputs = gate_weights(pipe), [], []
    if form == "file":
        save_file(given, tmp_path / "gates.safetensors")
    if form == "module":
        for layer, block in enumerate(pipe.transformer.blocks):
            block.attn1.to_gate_compress = torch.nn.Linear(32, 32, bias=False)
            block.attn1.to_gate_compress.weight.data = given[f"blocks.{layer}.attn1.to_gate_compress.weight"]
    original = Vsa.finish

    def finish(self, call, out):
        seen.append((call.layer, call.weights["to_gate_compress.weight"], call.hidden_states))
        return original(self, call, out)

    monkeypatch.setattr(Vsa, "finish", finish)
    hooks = [
        block.attn1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for block in pipe.transformer.blocks
    ]
    weights = {"mapping": given, "file": tmp_path / "gates.safetensors", "module": None}[form]
    with accelerate(pipe, Plan.uniform("vsa", 0.3, **SPARSE), weights=weights) as handle:
        gated = run(pipe)
        assert not handle.report().fallbacks
        assert all(site.hidden_states is None for site in bridge._handlers.values())
    assert len(seen) == 3 * 2 * 2 and len(inputs) == 4 * 2 * 2  # steps × branches × layers, one step of them dense
    for (layer, weight, hidden), entered in zip(seen, inputs[4:], strict=True):
        assert torch.equal(weight, given[f"blocks.{layer}.attn1.to_gate_compress.weight"]) and hidden is entered
    for hook in hooks:
        hook.remove()
    with accelerate(pipe, Plan.uniform("vsa", 0.3, **SPARSE), weights=given):
        assert torch.equal(run(pipe), gated)
    with accelerate(pipe, Plan.uniform("vsa", 0.3, **SPARSE), weights=gate_weights(pipe, 0.0)):
        assert not torch.equal(run(pipe), gated)


@pytest.mark.parametrize(("name", "tensor"), [("vsa", "to_gate_compress"), ("sla", "proj_l")])
def test_zero_gates_change_nothing_and_missing_ones_are_told(pipe, run, name, tensor):
    width = {"vsa": 32, "sla": 16}[name]
    plan = Plan.uniform(name, 0.3, **SPARSE)
    with accelerate(pipe, plan) as handle:
        bare = run(pipe)
        fallbacks = handle.report().fallbacks
    assert any(f"{name}: no trained weights ({tensor}.weight)" in text for text in fallbacks)
    zeros = {f"blocks.{layer}.attn1.{tensor}.weight": torch.zeros(width, width) for layer in range(2)}
    with accelerate(pipe, plan, weights=zeros) as handle:
        assert torch.equal(run(pipe), bare) and not handle.report().fallbacks
    with accelerate(pipe, plan, weights={key: torch.ones_like(value) for key, value in zeros.items()}):
        assert not torch.equal(run(pipe), bare)


def test_heads_may_differ(pipe, run):
    """Only the heads of the trained pattern change."""
    table = ((Rule("pooled", 0.3), Rule("vsa", 0.3)),)
    plan = Plan("mixed", table, tail="none", block=16, break_even=False)
    with accelerate(pipe, plan, weights=gate_weights(pipe, 0.0)):
        zero = run(pipe)
    only_first_head = {key: value.clone() for key, value in gate_weights(pipe, 0.0).items()}
    for value in only_first_head.values():
        value[:16] = 1  # rows of head 0, which is pooled
    with accelerate(pipe, plan, weights=only_first_head):
        assert torch.equal(run(pipe), zero)
    with accelerate(pipe, plan, weights=gate_weights(pipe, 1.0)):
        assert not torch.equal(run(pipe), zero)


def test_hooks_are_there_only_for_patterns_that_ask_and_go_with_restore(pipe, run):
    before = run(pipe)
    for name, count in (("sla", 0), ("vsa", 1)):
        handle = accelerate(pipe, Plan.uniform(name, 0.3, **SPARSE))
        for block in pipe.transformer.blocks:
            assert len(block.attn1._forward_pre_hooks) == len(block.attn1._forward_hooks) == count
        handle.restore()
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.transformer.modules())
    assert torch.equal(run(pipe), before)


def test_an_error_inside_lets_go_of_the_input(pipe, run, monkeypatch):
    def fail(self, call, out):
        raise RuntimeError("stopped")

    monkeypatch.setattr(Vsa, "finish", fail)
    with accelerate(pipe, Plan.uniform("vsa", 0.3, **SPARSE)):
        with pytest.raises(RuntimeError, match="stopped"):
            run(pipe)
        assert all(site.hidden_states is None for site in bridge._handlers.values())


def test_two_experts_have_weights_of_their_own(run, monkeypatch):
    pipe = make_pipe(transformer_2=make_transformer(), boundary_ratio=0.8)
    given = {
        "blocks.0.attn1.proj_l.weight": torch.full((16, 16), 1.0),
        "transformer_2.blocks.0.attn1.proj_l.weight": torch.full((16, 16), 2.0),
    }
    seen, original = set(), Sla.finish

    def finish(self, call, out):
        seen.add((call.step, call.layer, float(call.weights.get("proj_l.weight", torch.zeros(1)).mean())))
        return original(self, call, out)

    monkeypatch.setattr(Sla, "finish", finish)
    with accelerate(pipe, Plan.uniform("sla", 0.3, tail="none", block=16), weights=given):
        run(pipe)
    first = {mean for _, layer, mean in seen if layer == 0}
    assert first == {1.0, 2.0} and {mean for _, layer, mean in seen if layer == 1} == {0.0}


def test_compiled_layers_share_their_graphs(run):
    import torch._dynamo

    pipe = make_pipe(transformer=make_transformer(layers=10))
    width = torch.randn(32, 32)
    weights = {f"blocks.{layer}.attn1.to_gate_compress.weight": width for layer in range(10)}
    plan = Plan.uniform("vsa", 0.3, **SPARSE)
    with accelerate(pipe, plan, weights=weights):
        eager = run(pipe)
    torch._dynamo.reset()
    with accelerate(pipe, plan, weights=weights) as handle:
        pipe.transformer.compile_repeated_blocks(backend="eager")
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(run(pipe), eager, atol=1e-4, rtol=1e-4)
        assert not handle.report().fallbacks
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 10  # the hooks part them, not the layers
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["sla", "vsa"])
def test_trained_outputs_need_tokens_in_the_grids_order(name):
    with pytest.raises(PlanError, match=f"the pattern {name} adds a trained part"):
        replace(Plan.uniform(name, 0.3), hoist="gilbert")


def test_refusals_change_nothing(pipe, run, tmp_path):
    dense, plan = run(pipe), Plan.uniform("sla", 0.3)
    strangers = {f"blocks.{n}.ffn.weight": torch.zeros(1) for n in range(5)}
    text = tmp_path / "weights.txt"
    text.write_text("nothing")
    for weights, message in (
        (tmp_path / "missing.safetensors", "cannot read weights from .*missing.safetensors"),
        (text, "cannot read weights from .*weights.txt"),
        (3, "weights is a int"),
        ({"blocks.0.attn1.proj_l.weight": 1.0}, "blocks.0.attn1.proj_l.weight': float"),
        (strangers, r"5 keys that fit no site: blocks.0.ffn.weight, .*, …; .*transformer.blocks.0.attn1.proj_l.weight"),
        ({"blocks.7.attn1.proj_l.weight": torch.zeros(1)}, "1 keys that fit no site: blocks.7"),
    ):
        with pytest.raises(AccelerateError, match=message):
            accelerate(pipe, plan, weights=weights)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.transformer.modules())
    assert torch.equal(run(pipe), dense)
