"""What patterns remember: by transformer, layer, branch and generation, and reused only where the plan says so."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from conftest import make_pipe, make_transformer
from pointillist import Plan, accelerate
from pointillist.accel import site
from pointillist.accel.patterns.pattern import Pattern
from pointillist.accel.patterns.pooled import Pooled

SEEN = []


@dataclass(frozen=True)
class Probe(Pattern):
    """Keeps what `pooled` keeps, and writes down what it finds in its memory."""

    density: float = 0.4

    def prepare(self, call, out):
        SEEN.append(("prepare", call.layer, call.step, dict(call.memory), id(call.memory)))
        call.memory["prepared"] = call.step

    def select(self, call):
        SEEN.append(("select", call.layer, call.step, dict(call.memory), id(call.memory)))
        call.memory["calls"] = call.memory.get("calls", 0) + 1
        return Pooled(self.density).select(call)


@pytest.fixture(autouse=True)
def probe(monkeypatch):
    SEEN.clear()
    monkeypatch.setattr(site, "pattern_for", lambda *args: Probe())


PLAN = Plan.uniform("pooled", 0.4, block=16)


def test_memory_is_kept_by_layer_and_branch_within_a_generation(pipe, run):
    with accelerate(pipe, PLAN):
        run(pipe, steps=3, guidance=3.0)
        first = list(SEEN)
        run(pipe, steps=3, guidance=3.0)
    calls = Counter((layer, memory.get("calls", 0)) for kind, layer, _, memory, _ in first if kind == "select")
    assert calls == {(layer, n): 2 for layer in (0, 1) for n in range(3)}  # two branches, each counts for itself
    assert len({place for *_, place in first}) == 4
    assert [each[:4] for each in SEEN[len(first) :]] == [each[:4] for each in first]  # nothing survived


def test_the_last_dense_step_is_shown_to_the_pattern(pipe, run):
    with accelerate(pipe, replace(PLAN, schedule=replace(PLAN.schedule, dense_steps=2))):
        run(pipe, steps=4, guidance=1.0)
    assert [(kind, step) for kind, layer, step, *_ in SEEN if layer == 0] == [
        ("prepare", 1), ("select", 2), ("select", 3),
    ]  # fmt: skip
    assert all(memory["prepared"] == 1 for kind, _, _, memory, _ in SEEN if kind == "select")


def test_experts_start_cold(run):
    pipe = make_pipe(transformer=make_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.register_modules(transformer_2=make_transformer())
    pipe.register_to_config(boundary_ratio=0.8)
    with accelerate(pipe, PLAN) as handle:
        run(pipe, steps=4, guidance=1.0)
        assert {name.split(".")[0] for name in handle.report().density_per_site} == {"transformer", "transformer_2"}
    counts = [memory.get("calls", 0) for _, layer, _, memory, _ in SEEN if layer == 0]
    assert counts.count(0) == 2 and len(counts) == 4


def test_another_shape_starts_cold():
    runtime = site.Runtime(PLAN, "auto")
    runtime.state.step = 0
    runtime.memory("here", (1, 2))["x"] = 1
    assert runtime.memory("here", (1, 2)) == {"x": 1}
    assert runtime.memory("here", (1, 3)) == {} and runtime.memory("here", (1, 2)) == {}
    runtime.memory("here", (1, 2))["x"] = 1
    runtime.state.branch = "uncond"
    assert runtime.memory("here", (1, 2)) == {}
    runtime.state.step = None
    runtime.memory("here", (1, 2))["x"] = 1
    assert runtime.memory("here", (1, 2)) == {}  # outside of a generation nothing is kept


def test_memory_is_let_go_after_the_last_step_and_by_restore(pipe, run):
    held = []

    def look(pipe, step, timestep, tensors):
        held.append(len(handle._runtime._memories))
        if step == 1 and len(held) == 2:
            raise KeyboardInterrupt
        return tensors

    handle = accelerate(pipe, PLAN)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, steps=3, callback_on_step_end=look)
    assert held == [4, 4] and handle._runtime._memories
    run(pipe, steps=3, callback_on_step_end=look)
    assert held[2:] == [4, 4, 0] and not handle._runtime._memories
    held.clear()
    with pytest.raises(KeyboardInterrupt):
        run(pipe, steps=3, callback_on_step_end=look)
    handle.restore()
    assert not handle._runtime._memories


def test_a_dense_step_refreshes_what_is_reused(pipe, run):
    """With dense_every=3, steps 2 and 5 are dense; the choices of step 0 and 3 do not outlive them."""
    plan = replace(PLAN, reuse_steps=6, schedule=replace(PLAN.schedule, dense_every=3))
    with accelerate(pipe, plan):
        run(pipe, steps=6, guidance=1.0)
    assert [step for kind, layer, step, *_ in SEEN if kind == "select" and layer == 0] == [0, 3]


def test_layers_that_follow_another_do_not_calibrate(run):
    pipe = make_pipe(transformer=make_transformer(layers=4))
    schedule = replace(PLAN.schedule, dense_steps=1)
    with accelerate(pipe, replace(PLAN, reuse_layers=2, schedule=schedule)):
        run(pipe, steps=3, guidance=1.0)
    assert [layer for kind, layer, *_ in SEEN if kind == "prepare"] == [0, 2]


def test_a_residual_without_a_dense_step_is_noted(pipe, run):
    with accelerate(pipe, replace(PLAN, residual=True)) as handle:
        run(pipe, steps=2)
    assert any("no residual" in note for note in handle.report().fallbacks)
    with accelerate(pipe, replace(PLAN, residual=True, schedule=replace(PLAN.schedule, dense_steps=1))) as handle:
        run(pipe, steps=3)
    assert not handle.report().fallbacks


@pytest.mark.parametrize(
    ("layers", "steps", "selections"), [(1, 1, 16), (2, 1, 8), (4, 1, 4), (1, 2, 8), (2, 4, 2), (3, 1, 8)]
)
def test_choices_are_reused_as_the_plan_says(run, layers, steps, selections):
    """Four layers, four steps, one branch."""
    pipe = make_pipe(transformer=make_transformer(layers=4))
    with accelerate(pipe, replace(PLAN, reuse_layers=layers, reuse_steps=steps)) as handle:
        run(pipe, steps=4, guidance=1.0)
        assert handle.report().steps["sparse"] == 4
    assert sum(kind == "select" for kind, *_ in SEEN) == selections


def test_a_reused_choice_is_the_one_of_the_other_layer(run, monkeypatch):
    pipe = make_pipe(transformer=make_transformer(layers=2))
    kept, lay_out = [], site.lay_out

    def spy(*args):
        laid = lay_out(*args)
        kept.append(laid.layout.mask())
        return laid

    monkeypatch.setattr(site, "lay_out", spy)
    with accelerate(pipe, replace(PLAN, reuse_layers=2)):
        run(pipe, steps=2, guidance=1.0, size=128)
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[2], kept[3])
    kept.clear()
    with accelerate(pipe, PLAN):
        run(pipe, steps=2, guidance=1.0, size=128)
    assert not torch.equal(kept[0], kept[1])
