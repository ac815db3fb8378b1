"""Cache tables in real, tiny pipelines, against their definition and Diffusers' own."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from families import Family
from pointillist import AccelerateError, Plan, accelerate, defaults, load_pipeline
from pointillist.accel import memory
from pointillist.accel.conflicts import model_of, targets_of
from pointillist.accel.regions.policy import Regions
from pointillist.accel.schedule import Schedule
from pointillist.accel.step_cache.table import CacheTable, CacheTableError, MadeFor

LAYERS = {"wan": 2, "ltx": 4}
MADE_FOR = MadeFor("wan-made-up", "FlowMatchEulerDiscreteScheduler", 3.0, True)


@pytest.fixture(params=LAYERS)
def family(request):
    return Family(request.param)


def random_table(steps: int, layers: int, **more) -> CacheTable:
    """Half of the modules, the first step whole."""
    computed = torch.rand(2, steps, layers) < 0.5
    computed[:, 0] = True
    computed[:, -1] = False
    computed[0, 1, 0] = False
    rows = [tuple("".join("01"[int(x)] for x in row) for row in kind) for kind in computed]
    return CacheTable(*rows, **more)


def inner(family, layer: int) -> dict[str, torch.nn.Module]:
    if family.name == "wan":
        return {
            "attention": family.pipe.transformer.blocks[layer].attn1,
            "mlp": family.pipe.transformer.blocks[layer].ffn,
        }
    block = family.pipe.transformer.transformer_blocks[layer]
    return {"attention": block.attn1, "mlp": block.ff}


@pytest.mark.parametrize(("batch", "guidance"), [(1, 3.0), (2, 3.0), (2, 1.0)])
def test_a_table_that_computes_everything_changes_nothing(family, batch, guidance):
    dense = [family.run(size, batch=batch, guidance=guidance) for size in (64, 32)]
    table = CacheTable.every(8, LAYERS[family.name], 1)
    with accelerate(family.pipe, "none", cache=table) as handle:
        found = [family.run(size, batch=batch, guidance=guidance) for size in (64, 32)]
        report = handle.report()
    assert all(torch.equal(a, b) for a, b in zip(dense, found, strict=True))
    assert report.kinds == ("dense",) * 8 and "0% of the modules reused" in report.cache and not report.fallbacks


def test_a_module_that_is_reused_gives_what_it_last_gave(family):
    """Written out with hooks of PyTorch: the modules are called, and what they give is replaced."""
    table, place, kept = random_table(6, LAYERS[family.name]), {}, {}
    hooks = []

    def replaced(layer, kind):
        def hook(module, args, kwargs, output):
            key = (place["branch"], layer, kind)
            if not table.computes(place["step"], layer, kind):
                return kept[key]
            kept[key] = output
            return None

        return hook

    def told(name, branch, step, compute):
        place.update(branch=branch, step=step)
        return compute()

    with accelerate(family.pipe, "none") as handle:
        handle.intercept(told)
        for layer in range(LAYERS[family.name]):
            for kind, module in inner(family, layer).items():
                hooks.append(module.register_forward_hook(replaced(layer, kind), with_kwargs=True))
        expected = family.run(steps=6)
        for hook in hooks:
            hook.remove()
    dense = family.run(steps=6)
    with accelerate(family.pipe, "none", cache=table) as handle:
        found, again = family.run(steps=6), family.run(steps=6)
        report = handle.report()
    assert torch.equal(found, expected) and torch.equal(found, again) and not torch.equal(found, dense)
    whole = [step for step in range(6) if "1" in table.attention[step] + table.mlp[step]]
    assert [step for step, kind in enumerate(report.kinds) if kind != "cached"] == whole and 5 not in whole
    assert f"{table.share:.0%} of the modules reused" in report.cache and report.held["step cache"] > 0


def test_what_it_holds_is_predicted_and_refused(family, monkeypatch):
    for table in (CacheTable.every(8, LAYERS[family.name], 2), CacheTable.every(8, LAYERS[family.name], 3)):
        for batch, guidance in ((1, 1.0), (2, 3.0)):
            with accelerate(family.pipe, "none", cache=replace(table, predictor="taylor")) as handle:
                family.run(batch=batch, guidance=guidance)
                report = handle.report()
            assert report.held["step cache"] == pytest.approx(report.predicted["step cache"], rel=0.05)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    with accelerate(family.pipe, "none", cache=table), pytest.raises(MemoryError, match=r"outputs of \d modules and"):
        family.run()


def test_it_leaves_no_trace(family):
    dense, modules = family.run(), list(family.pipe.transformer.modules())
    before = [set(vars(module)) for module in modules]
    with accelerate(family.pipe, "none", cache=CacheTable.every(8, LAYERS[family.name], 3)):
        assert not torch.equal(family.run(), dense)
        assert [set(vars(module)) for module in modules] != before
    assert [set(vars(module)) for module in modules] == before and torch.equal(family.run(), dense)


def test_another_shape_within_a_generation_begins_anew():
    """What was kept is of other tokens, so the module is computed."""
    family = Family("wan")
    table = CacheTable.every(8, 2, 8)
    with accelerate(family.pipe, "none", cache=table) as handle:
        shrunk = []

        def smaller(pipe, step, timestep, tensors):
            if step == 3:
                tensors["latents"] = tensors["latents"][..., :6].contiguous()
                shrunk.append(step)
            return tensors

        family.run(callback_on_step_end=smaller)
        assert handle.report().kinds == ("dense", *("cached",) * 3, "dense", *("cached",) * 3) and shrunk


def test_attention_at_intervals_is_pyramid_attention_broadcast():
    family = Family("wan")
    dense = family.run(guidance=1.0)
    transformer, timestep = family.pipe.transformer, {}
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: timestep.update(now=int(kwargs["timestep"][0])), with_kwargs=True
    )
    transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=3, spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=("blocks.*attn1",), current_timestep_callback=lambda: timestep["now"],
        )
    )  # fmt: skip
    theirs = family.run(guidance=1.0)
    transformer.disable_cache()
    hook.remove()
    with accelerate(family.pipe, "none", cache=CacheTable.intervals(8, 2, attention=3)):
        torch.testing.assert_close(family.run(guidance=1.0), theirs, atol=1e-6, rtol=1e-5)
    assert not torch.equal(theirs, dense)


@pytest.mark.parametrize(("name", "guidance"), [("wan", 3.0), ("wan", 1.0), ("ltx", 1.0)])
def test_module_outputs_on_a_line_are_taylor_seer(name, guidance):
    """TaylorSeer of first order counts steps, ours goes by sigmas: they are one where sigmas are evenly spaced."""
    family, steps = Family(name), 11
    family.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    transformer, layers = family.pipe.transformer, LAYERS[name]
    theirs = {}
    for modules in ("attn1", "(attn1|ffn|ff)"):
        transformer.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=3, disable_cache_before_step=3, max_order=1, taylor_factors_dtype=torch.float32,
                cache_identifiers=[f"^(blocks|transformer_blocks)\\.\\d+\\.{modules}$"],
            )
        )  # fmt: skip
        theirs[modules] = family.run(steps=steps, guidance=guidance)
        transformer.disable_cache()
    rows = tuple(("1" if step in (0, 1, 2, 4, 7, 10) else "0") * layers for step in range(steps))
    whole = ("1" * layers,) * steps
    for modules, mlp in (("attn1", whole), ("(attn1|ffn|ff)", rows)):
        with accelerate(family.pipe, "none", cache=CacheTable(rows, mlp, predictor="taylor")) as handle:
            found = family.run(steps=steps, guidance=guidance)
            assert handle.sigmas[0] - handle.sigmas[1] == pytest.approx(handle.sigmas[-2] - handle.sigmas[-1], rel=1e-3)
        torch.testing.assert_close(found, theirs[modules], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found, family.run(steps=steps, guidance=guidance), atol=1e-3)


def test_attention_at_intervals_is_faster_cache_without_its_weight():
    """FasterCache continues from what it predicted itself; with the weight 0 it reuses the last computed attention."""
    family, timestep = Family("wan"), {}
    transformer = family.pipe.transformer
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: timestep.update(now=int(kwargs["timestep"][0])), with_kwargs=True
    )
    transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 900),
            spatial_attention_block_identifiers=("blocks.*attn1",), attention_weight_callback=lambda module: 0.0,
            current_timestep_callback=lambda: timestep["now"], is_guidance_distilled=True,
        )
    )  # fmt: skip
    theirs = family.run(guidance=1.0)
    transformer.disable_cache()
    hook.remove()
    with accelerate(family.pipe, "none") as handle:
        dense = family.run(guidance=1.0)
        sigmas = handle.sigmas
    rows = tuple("00" if int(1000 * s) < 900 and i % 2 else "11" for i, s in enumerate(sigmas))
    with accelerate(family.pipe, "none", cache=CacheTable(rows, ("11",) * 8)):
        torch.testing.assert_close(family.run(guidance=1.0), theirs, atol=1e-6, rtol=1e-5)
    assert not torch.equal(theirs, dense) and "00" in rows


def test_a_predictor_extrapolates_what_a_module_gave():
    family = Family("wan")
    table = CacheTable.every(8, 2, 3)
    found = {}
    for predictor in ("last", "taylor"):
        with accelerate(family.pipe, "none", cache=replace(table, predictor=predictor)):
            found[predictor] = family.run()
    dense = family.run()
    errors = {name: float((each - dense).norm()) for name, each in found.items()}
    assert errors["taylor"] != errors["last"] and max(errors.values()) < float(dense.norm())


def test_what_does_not_fit_is_refused(tmp_path):
    family = Family("wan")
    model = model_of(targets_of(family.pipe))
    mine = replace(CacheTable.every(8, 2, 2), made_for=replace(MADE_FOR, model=model))
    for wrong, message in (
        (replace(mine, made_for=MADE_FOR), f"another model: wan-made-up, but here it is {model}"),
        (CacheTable.every(8, 3, 2), "another layers: 3, but here it is 2"),
    ):
        with pytest.raises(AccelerateError, match=message):
            accelerate(family.pipe, "none", cache=wrong)
    calls = []
    hook = family.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with accelerate(family.pipe, "none", cache=mine) as handle:
        with pytest.raises(AccelerateError, match="another number of steps: 8, but here it is 5"):
            family.run(steps=5)
        assert not calls
        family.run(guidance=3.0)
        assert calls and not handle.report().fallbacks
        family.run(guidance=1.0)
        assert "learned with the guidance on; here it is off" in "".join(handle.report().fallbacks)
        family.pipe.scheduler = UniPCMultistepScheduler.from_config(family.pipe.scheduler.config)
        with pytest.raises(AccelerateError, match="another scheduler: FlowMatchEulerDiscreteScheduler"):
            family.run()
    hook.remove()
    other = Family("wan")
    doubtful = replace(
        mine, made_for=replace(mine.made_for, shift=5.0, plan="mine", model=model_of(targets_of(other.pipe)))
    )
    doubtful.save(tmp_path / "table.json")
    with accelerate(other.pipe, "none", cache=f"table:{tmp_path / 'table.json'}") as handle:
        other.run()
        notes = "".join(handle.report().fallbacks)
        assert "sigma shift 5.0; here it is 3.0" in notes and "attention plan mine; here it is none" in notes
    with pytest.raises(AccelerateError, match="no cache table is shipped for this model"):
        accelerate(other.pipe, "none", cache="table")
    with pytest.raises(AccelerateError, match="cannot be read as a cache table"):
        accelerate(other.pipe, "none", cache="table:nowhere.json")
    with pytest.raises(AccelerateError, match="take one away"):
        accelerate(other.pipe, "none", cache=CacheTable.every(8, 2, 2), regions="easy")
    with pytest.raises(AccelerateError, match=r"FluxSingleTransformerBlock.*fused"):
        accelerate(Family("flux").pipe, "none", cache=CacheTable.every(8, 5, 2))


def test_patterns_see_the_dense_step_that_they_learn_from():
    """Attention of the last dense step is computed although the table would reuse it."""
    family = Family("wan")
    plan = replace(Plan.uniform("pooled", 0.4, block=16), schedule=Schedule(dense_steps=3))
    with accelerate(family.pipe, plan, cache=CacheTable.every(8, 2, 4)) as handle:
        family.run()
        assert handle.report().kinds == ("dense", "cached", "dense", "cached", "sparse", *("cached",) * 3)


def test_intervals():
    assert CacheTable.every(5, 2, 2).attention == ("11", "00", "11", "00", "11") == CacheTable.every(5, 2, 2).mlp
    table = CacheTable.intervals(6, 1, attention=3, mlp=1, first=2, last=1)
    assert table.attention == ("1", "1", "0", "1", "0", "1") and table.mlp == ("1",) * 6 and table.share == 2 / 12
    for wrong in ((0, 1, 1), (5, 0, 1), (5, 1, 0), (5, 1, True), (1001, 1, 1)):
        with pytest.raises(CacheTableError):
            CacheTable.every(*wrong)


def test_files(tmp_path):
    table = random_table(7, 3, made_for=MADE_FOR, predictor="taylor", name="mine")
    table.save(tmp_path / "table.json")
    assert CacheTable.load(tmp_path / "table.json") == table == CacheTable.from_json(table.to_json())
    assert [each.name for each in tmp_path.iterdir()] == ["table.json"]
    plain = replace(table, made_for=None)
    assert CacheTable.from_json(plain.to_json()) == plain


def read(text: str) -> CacheTable | None:
    """None where it is refused."""
    try:
        return CacheTable.from_json(text)
    except CacheTableError:
        return None


VALUES = json.loads(random_table(3, 2, made_for=MADE_FOR).to_json())
WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.text("012", max_size=3)),
    st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(VALUES)), WRONG)
def test_wrong_values_are_told(name, value):
    """A changed field gives another valid table or an error, and never anything else."""
    table = read(json.dumps({**VALUES, name: value}))
    assert table is None or (CacheTable.from_json(table.to_json()) == table and table.attention[0] == "11")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(VALUES["made_for"])), WRONG)
def test_wrong_values_of_what_it_is_made_for_are_told(name, value):
    table = read(json.dumps({**VALUES, "made_for": {**VALUES["made_for"], name: value}}))
    assert table is None or CacheTable.from_json(table.to_json()) == table


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_give_a_table_or_an_error(tmp_path_factory, noise, cut):
    path = tmp_path_factory.mktemp("fuzz") / "table.json"
    whole = json.dumps(VALUES).encode()
    for data in (noise, whole[:cut], whole[:cut] + noise, b"[" * 100_000):
        path.write_bytes(data)
        with contextlib.suppress(CacheTableError):
            assert CacheTable.load(path) == CacheTable.from_json(data.decode())


def test_the_shipped_table_is_the_embedded_models():
    pipe = load_pipeline("embedded")
    table = CacheTable.shipped(model_of(targets_of(pipe, sparse=False)))
    assert table.share == 0.5 and table.steps == defaults(pipe)["num_inference_steps"] and table.layers == 6
    with accelerate(pipe, "none", cache="table") as handle:
        pipe("a red circle on black", height=64, width=64, num_frames=17, num_inference_steps=20, output_type="latent")
        report = handle.report()
    assert "50% of the modules reused" in report.cache and not report.fallbacks
    assert report.held["step cache"] == pytest.approx(report.predicted["step cache"], rel=0.05)


def test_regions_are_not_mixed_in():
    with pytest.raises(AccelerateError, match="part of the tokens"):
        accelerate(Family("wan").pipe, "none", cache=CacheTable.every(8, 2, 2), regions=Regions())
