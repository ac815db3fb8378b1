"""Every model family in a tiny pipeline: exact where it must be, and elsewhere equal to an independent reference.

The reference is dense attention with a mask over tokens, put into torch's own attention by a mode. What it knows of the
models (where their self-attentions are, and where the video's tokens begin) is written down here once more.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch._dynamo
from peft import LoraConfig
from torch.overrides import TorchFunctionMode

from families import PIPELINES, TEXT, WITHOUT, Family, run_case
from jobs import run_job
from pointillist import AccelerateError, Plan, accelerate
from pointillist.accel.layouts import pattern_for
from pointillist.accel.models import FAMILIES, family_of
from pointillist.accel.patterns.pattern import Call
from pointillist.accel.tiles import whole_video

SPARSE = Plan.uniform("window", 0.4, tail="none", block=16)
DYNAMIC = replace(Plan.uniform("pooled", 0.4, tail="pooled", dense_steps=1, block=16), residual=True)
BOTH = r"(single_)?transformer_blocks\.\d+\.attn"


def captions(call: dict[str, Any]) -> torch.Tensor:
    return call["encoder_attention_mask"].sum(1)


@dataclass(frozen=True)
class Facts:
    """What the reference knows of a model, from its source."""

    sites: str
    """The names of all self-attentions match it."""
    grid: tuple[int, int, int] = (1, 8, 8)
    """Of tokens, at 64 × 64 pixels."""
    start: int | Callable[[dict[str, Any]], torch.Tensor] = 0
    """Where the video's tokens begin in the sequence; in every entry of the batch, from the arguments of the call."""
    masks: bool = False
    """Whether it masks padding of prompts, wherever it sees them."""
    ragged: bool = False
    """Whether prompts of a batch may be of unequal length."""
    batch: int = 2
    """At most so many prompts at once."""
    shapes: tuple[Any, ...] = (64, (64, 96))
    """Two shapes to run."""


VIDEO = (3, 4, 4)
FACTS = {
    "wan": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "wan2.2-a14b": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "wan2.2-ti2v-5b": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "wan-i2v": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "wan-vace": Facts(r"(vace_)?blocks\.\d+\.attn1", VIDEO, batch=1),
    "hunyuan-video": Facts(BOTH, VIDEO, masks=True, ragged=True),
    "hunyuan-video-1.5": Facts(BOTH, VIDEO, masks=True, ragged=True),
    "cogvideox": Facts(r"transformer_blocks\.\d+\.attn1", VIDEO, start=TEXT),
    "cogvideox-1.5": Facts(r"transformer_blocks\.\d+\.attn1", (2, 4, 4), start=TEXT),
    "ltx": Facts(r"transformer_blocks\.\d+\.attn1", (3, 8, 8), masks=True, ragged=True),
    "ltx-2": Facts(r"transformer_blocks\.\d+\.attn1", (2, 4, 4)),
    "mochi": Facts(r"transformer_blocks\.\d+\.attn1", VIDEO, masks=True, ragged=True),
    "skyreels-v2": Facts(r"blocks\.\d+\.attn1", VIDEO),
    "cosmos": Facts(r"transformer_blocks\.\d+\.attn1", VIDEO),
    "flux": Facts(BOTH, start=TEXT),
    "flux-kontext": Facts(BOTH, start=TEXT),
    "visualcloze": Facts(BOTH, start=TEXT, shapes=(64, 96)),
    "flux-2": Facts(BOTH, start=TEXT),
    "chroma": Facts(BOTH, start=TEXT, masks=True, ragged=True),
    "sd3": Facts(r"transformer_blocks\.\d+\.attn2?"),
    "sd3.5": Facts(r"transformer_blocks\.\d+\.attn2?"),
    "pixart": Facts(r"transformer_blocks\.\d+\.attn1", masks=True, ragged=True),
    "qwen-image": Facts(BOTH, start=TEXT, masks=True, ragged=True),
    "qwen-image-edit": Facts(BOTH, start=TEXT, masks=True, batch=1),
    "nucleus-moe": Facts(BOTH, masks=True, ragged=True),
    "lumina-next": Facts(r"layers\.\d+\.attn1", masks=True, ragged=True),
    "lumina-2": Facts(r"layers\.\d+\.attn", start=captions, masks=True, ragged=True),
    "hidream": Facts(r"(double|single)_stream_blocks\.\d+\.block\.attn1", shapes=(64, (64, 144))),  # it keeps the area
    "z-image": Facts(r"layers\.\d+\.attention", ragged=True),
}


def grid_at(name: str, size: int | tuple[int, int]) -> tuple[int, int, int]:
    frames, height, width = FACTS[name].grid
    rows, columns = (size, size) if isinstance(size, int) else size
    return frames, height * rows // 64, width * columns // 64


class Reference(TorchFunctionMode):
    """Leaves pairs out of torch's attention, token by token, inside the self-attentions of some transformers."""

    def __init__(self, kept: torch.Tensor, start: int | Callable[[dict[str, Any]], torch.Tensor]) -> None:
        super().__init__()
        self._kept, self._start = kept, start
        self.call: dict[str, Any] = {}
        self.inside = False
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention and self.inside:
            args, kwargs = self._masked(*args, **kwargs or {})
        return func(*args, **kwargs or {})

    def _masked(self, query, key, value, attn_mask=None, **kwargs):
        self.calls += 1
        batch, rows, columns = query.shape[0], query.shape[2], key.shape[2]
        starts = self._start(self.call).tolist() if callable(self._start) else [self._start] * batch
        mask = torch.ones(batch, 1, rows, columns, dtype=torch.bool)
        video = len(self._kept)
        for entry, start in zip(mask, starts, strict=True):
            entry[0, start : start + video, start : start + video] = self._kept
        if attn_mask is not None:
            assert attn_mask.dtype == torch.bool
            mask = mask & attn_mask
        return (query, key, value), dict(kwargs, attn_mask=mask)


@contextmanager
def reference(family: Family, size: int | tuple[int, int]) -> Iterator[Reference]:
    facts, grid = FACTS[family.name], grid_at(family.name, size)
    mode, hooks = Reference(kept_pairs(grid), facts.start), []
    for transformer in transformers(family):
        hooks.append(
            transformer.register_forward_pre_hook(lambda _, __, call: mode.call.update(call), with_kwargs=True)
        )
        for module in self_attentions(family.name, transformer).values():
            hooks.append(module.register_forward_pre_hook(lambda *_: setattr(mode, "inside", True)))
            hooks.append(module.register_forward_hook(lambda *_: setattr(mode, "inside", False)))
    try:
        with mode:
            yield mode
    finally:
        for hook in hooks:
            hook.remove()


def kept_pairs(grid: tuple[int, int, int]) -> torch.Tensor:
    """bool [N, N]: what the plan's pattern keeps, of each token's block."""
    pattern = pattern_for("window", 0.4, (), grid, whole_video(grid), 16)
    nothing = torch.empty(0)
    found = pattern.select(Call(nothing, nothing, nothing, 1.0, grid, whole_video(grid), 16))
    order, bounds = found.queries.order[0, 0].tolist(), found.queries.bounds[0, 0].tolist()
    assert found.keys.order[0, 0].tolist() == order
    of_token = torch.empty(len(order), dtype=torch.int64)
    for block, (first, last) in enumerate(pairwise(bounds)):
        of_token[order[first:last]] = block
    return found.mask[0, 0][of_token][:, of_token]


def transformers(family: Family) -> list[Any]:
    found = (getattr(family.pipe, name, None) for name in ("transformer", "transformer_2"))
    return [each for each in found if each is not None]


def self_attentions(name: str, transformer: Any) -> dict[str, torch.nn.Module]:
    return {path: each for path, each in transformer.named_modules() if re.fullmatch(FACTS[name].sites, path)}


def check_sparse(family: Family, size: int | tuple[int, int] = 64, **call: Any) -> torch.Tensor:
    """The latents of a sparse run, which are the reference's."""
    with accelerate(family.pipe, SPARSE) as handle:
        sparse = family.run(size, steps=2, **call)
        report, grid = handle.report(), handle.grid
    assert grid == grid_at(family.name, size) and not report.fallbacks and report.steps["sparse"] == 2
    with reference(family, size) as mode:
        expected = family.run(size, steps=2, **call)
    assert mode.calls >= 2 * len(report.density_per_site) / len(transformers(family))
    assert report.density == pytest.approx(float(kept_pairs(grid).float().mean()), abs=1e-6)
    torch.testing.assert_close(sparse, expected, atol=5e-4, rtol=1e-3)
    return sparse


@pytest.fixture(params=PIPELINES)
def family(request):
    return Family(request.param)


def test_every_family_is_tried():
    assert set(FACTS) == set(PIPELINES)
    assert {type(family_of(Family(name).pipe.transformer)) for name in PIPELINES} == {type(each) for each in FAMILIES}


def test_the_sites_are_all_self_attentions(family):
    for transformer in transformers(family):
        found = family_of(transformer).site_names(transformer)
        assert set(found) == set(self_attentions(family.name, transformer)) and len(set(found)) == len(found)


def test_density_one_and_restoring_are_exact(family):
    """With two prompts, guided and not."""
    family.run(steps=2)
    modules = [module for each in transformers(family) for module in each.modules()]
    traces = [set(vars(module)) for module in (*modules, family.pipe.scheduler)]
    for guidance in (3.0, 1.0):
        call = dict(steps=2, batch=FACTS[family.name].batch, guidance=guidance)
        dense = family.run(**call)
        for plan in ("none", Plan.uniform("pooled", 1.0, block=16)):
            with accelerate(family.pipe, plan) as handle:
                assert torch.equal(family.run(**call), dense)
                assert handle.report().density_overall == 1.0 and not handle.report().fallbacks
        with accelerate(family.pipe, SPARSE):
            assert not torch.equal(family.run(**call), dense)
        assert torch.equal(family.run(**call), dense)
    assert [set(vars(module)) for module in (*modules, family.pipe.scheduler)] == traces
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


def test_sparse_output_equals_a_masked_reference(family):
    """Text, reference images and padding are exact in it: all of their rows and columns are computed."""
    first, second = FACTS[family.name].shapes
    check_sparse(family, first, batch=1, guidance=1.0)
    check_sparse(family, second, batch=FACTS[family.name].batch, guidance=3.0)


@pytest.mark.parametrize("name", [name for name, facts in FACTS.items() if facts.ragged])
def test_prompts_of_unequal_length(name):
    """Padding is never seen, and what is no padding always."""
    family, call = Family(name), dict(batch=2, lengths=[5, 12], negative_lengths=[12, 9])
    sparse = check_sparse(family, 64, **call)
    with accelerate(family.pipe, SPARSE):
        assert not torch.allclose(family.run(steps=2, batch=2, lengths=[6, 12], negative_lengths=[12, 9]), sparse)
    if FACTS[name].masks:
        poisoned = check_sparse(family, 64, padding=30.0, **call)
        torch.testing.assert_close(poisoned, sparse, atol=1e-4, rtol=1e-4)


def test_dynamic_patterns_run_everywhere(family):
    """With a tail, and the residual of a dense step."""
    dense = family.run(steps=4)
    with accelerate(family.pipe, DYNAMIC) as handle:
        assert not torch.allclose(family.run(steps=4), dense)
        report = handle.report()
    assert report.steps["dense"] == 1 and report.steps["sparse"] == 3 and report.density < 0.6
    if len(transformers(family)) == 1:  # an expert that takes over has had no dense step
        assert not report.fallbacks


def test_two_shapes_in_a_row_and_callbacks(family):
    first, second = FACTS[family.name].shapes
    alone = []
    for size in (first, second):
        with accelerate(family.pipe, SPARSE):
            alone.append(family.run(size, steps=2))
    with accelerate(family.pipe, SPARSE):
        for size in (0, 1, 0):
            assert torch.equal(family.run((first, second)[size], steps=2), alone[size])
    if "callback_on_step_end" in inspect.signature(family.pipe.__call__).parameters:
        seen = []

        def halve(pipe, step, timestep, given):
            seen.append(step)
            return {"latents": given["latents"] / 2}

        changed = check_sparse(family, first, callback_on_step_end=halve)
        assert seen == [0, 1] * 2 and not torch.allclose(changed, alone[0])


def group_offload(family: Family) -> None:
    cpu = torch.device("cpu")
    for each in transformers(family):
        each.enable_group_offload(onload_device=cpu, offload_device=cpu, num_blocks_per_group=1)


def leaf_offload(family: Family) -> None:
    cpu = torch.device("cpu")
    for each in transformers(family):
        each.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def model_offload(family: Family) -> None:
    family.pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("offload", [group_offload, pytest.param(leaf_offload, marks=pytest.mark.slow), model_offload])
def test_offloading(family, offload):
    dense = family.run(steps=2)
    offload(family)
    assert torch.equal(family.run(steps=2), dense)
    check_sparse(family)
    assert torch.equal(family.run(steps=2), dense)


@pytest.mark.parametrize("fused", [False, True])
def test_lora(family, fused):
    if not hasattr(family.pipe.transformer, "add_adapter"):
        pytest.skip("Diffusers loads no LoRA into it")
    dense = family.run(steps=2)
    for each in transformers(family):
        each.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
        with torch.no_grad():
            for name, weight in each.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.2)
        if fused:
            each.fuse_lora()
    adapted = family.run(steps=2)
    assert not torch.allclose(adapted, dense)
    check_sparse(family)
    assert torch.equal(family.run(steps=2), adapted)


def test_layerwise_casting(family):
    for each in transformers(family):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense = family.run(steps=2)
    check_sparse(family)
    assert torch.equal(family.run(steps=2), dense)


def test_save_and_load_after_restoring(family, tmp_path):
    with accelerate(family.pipe, SPARSE):
        family.run(steps=2)
    expected = family.run(steps=2)
    for name in ("transformer", "transformer_2"):
        if getattr(family.pipe, name, None) is not None:
            getattr(family.pipe, name).save_pretrained(tmp_path / name)
            kind = type(getattr(family.pipe, name))
            family.pipe.register_modules(**{name: kind.from_pretrained(tmp_path / name)})
    torch.testing.assert_close(family.run(steps=2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [
    name if name in ("wan", "flux", "sd3", "cosmos") else pytest.param(name, marks=pytest.mark.slow)
    for name in PIPELINES
])  # fmt: skip
def test_compiled(name):
    """One graph for each kind of block, and none more in later steps."""
    family = Family(name)
    with accelerate(family.pipe, SPARSE):
        eager = family.run(steps=2)
    torch._dynamo.reset()
    if family.name in EAGER_ONLY:
        pytest.skip(EAGER_ONLY[family.name])
    with accelerate(family.pipe, SPARSE):
        for each in transformers(family):
            compile_blocks(each)
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(family.run(steps=2), eager, atol=1e-4, rtol=1e-4)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        family.run(steps=4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
        assert not torch._dynamo.utils.counters["graph_break"]


EAGER_ONLY = {"hidream": "eager only: its experts are chosen on the host"}


def compile_blocks(transformer: Any) -> None:
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        for block in {block for block, _ in family_of(transformer).sites(transformer)}:
            block.compile(fullgraph=True, backend="eager")


@pytest.mark.parametrize("name", [*PIPELINES, *WITHOUT])
def test_steps_are_cached(name):
    family = Family(name)
    dense = family.run(steps=8)
    with accelerate(family.pipe, "none", cache="rate:threshold=1000,first=0.3,most=2") as handle:
        assert not torch.equal(family.run(steps=8), dense)
        assert handle.report().steps["cached"] >= 2
    assert torch.equal(family.run(steps=8), dense)


def test_regions(family):
    if not all(family_of(each).can_take_rows for each in transformers(family)):
        pytest.skip("whole steps only")
    dense = family.run(steps=8)
    for plan in ("none", SPARSE):
        with accelerate(family.pipe, plan, regions="easy") as handle:
            assert not torch.equal(family.run(steps=8), dense)
            assert handle.report().steps["region"] >= 2
    assert torch.equal(family.run(steps=8), dense)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    return run_job(2, "families", list(PIPELINES), tmp_path_factory.mktemp("two"), seconds=280)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_context_parallel(of_two_processes, name):
    found = of_two_processes[name]
    if isinstance(found, str) and "it is not known how" in found:
        pytest.skip("no")
    assert not isinstance(found, str), found
    torch.testing.assert_close(found, run_case(name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_sparse_attention_says_why(name):
    why = {"sana": "linear already", "cogview4": "docs/models.md"}[name]
    with pytest.raises(AccelerateError, match=why):
        accelerate(Family(name).pipe)
