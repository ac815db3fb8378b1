"""Region-adaptive sampling in a real, tiny Wan: exactness, definitions, ageing, memory, refusals."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from conftest import make_pipe, make_transformer
from families import Family
from pointillist import AccelerateError, Plan, PlanError, accelerate, load_pipeline
from pointillist.accel import memory
from pointillist.accel.memory import held_bytes
from pointillist.accel.plan import Schedule
from pointillist.accel.regions import keys
from pointillist.accel.regions.choose import aged, importance, tiles_of, tokens_of
from pointillist.accel.regions.policy import Regions, RegionsError
from pointillist.accel.step_cache.policy import Caching
from pointillist.accel.timeline_picture import write_timeline

SOME = "change:share=0.4,every=3,from=1"


@pytest.mark.parametrize("text", ["change:share=1,from=1,every=2", "low_std:share=1,from=1,every=3"])
@pytest.mark.parametrize(("batch", "guidance"), [(1, 3.0), (2, 3.0), (2, 1.0)])
@pytest.mark.parametrize("name", ["wan", "flux", "ltx"])
def test_all_tokens_are_no_acceleration(name, text, batch, guidance):
    family = Family(name)
    dense = [family.run(size, batch=batch, guidance=guidance) for size in (64, 96)]
    with accelerate(family.pipe, "none", regions=text) as handle:
        found = [family.run(size, batch=batch, guidance=guidance) for size in (64, 96)]
        assert handle.report().steps["region"] >= 4
    assert all(torch.equal(a, b) for a, b in zip(dense, found, strict=True))


def test_it_computes_a_part_and_leaves_no_trace(pipe, run):
    dense = run(pipe, steps=8)
    with accelerate(pipe, "none", regions=SOME) as handle:
        first, second = run(pipe, steps=8), run(pipe, steps=8)
        report = handle.report()
    assert torch.equal(first, second) and not torch.equal(first, dense)
    assert report.kinds == ("dense", "region", "region", "dense", "region", "region", "dense", "region")
    assert report.ages[1] == (20, 28) and sum(report.ages[2]) == 48 and report.ages[3] == (48,)
    assert torch.equal(run(pipe, steps=8), dense)


def test_a_region_step_is_the_definition():
    """One layer, one branch: queries of the chosen tokens over all keys, old ones where a token is not chosen."""
    pipe = make_pipe(transformer=make_transformer(layers=1))
    rows, captured = torch.tensor([1, 7, 8, 30, 47]), {}

    def keep(site, branch, step, q, k, v, out):
        captured[step] = (q.clone(), k.clone(), v.clone())

    text = torch.randn(1, 12, 32)
    call = dict(
        prompt_embeds=text, negative_prompt_embeds=text, height=64, width=64, num_frames=9, guidance_scale=1.0,
        num_inference_steps=2, output_type="latent",
    )  # fmt: skip
    with accelerate(pipe, "none") as handle:
        handle.observe(keep)
        seen = []
        handle.intercept(lambda name, branch, step, compute: seen.append(compute()) or seen[-1])
        pipe(**call, generator=torch.Generator().manual_seed(1))
    dense_q, new_k, new_v = captured[1]
    _, old_k, old_v = captured[0]
    with accelerate(pipe, "none", regions="change:share=0.1,max_age=10,from=1,every=2") as handle:
        handle.compute_only(rows)
        inner = pipe.transformer.blocks[0].attn1
        found = []
        hook = inner.to_out[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))
        outputs = []
        handle.intercept(lambda name, branch, step, compute: outputs.append(compute()) or outputs[-1])
        pipe(**call, generator=torch.Generator().manual_seed(1))
        hook.remove()
    k, v = old_k.clone(), old_v.clone()
    k[:, rows], v[:, rows] = new_k[:, rows], new_v[:, rows]
    q = dense_q[:, rows].transpose(1, 2).double()
    weights = (q @ k.transpose(1, 2).double().mT * q.shape[-1] ** -0.5).softmax(-1)
    expected = (weights @ v.transpose(1, 2).double()).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found[1].double(), expected, atol=1e-5, rtol=1e-4)
    first, second = outputs[0][0], outputs[1][0]  # [1, 16, 3, 8, 8]: rows of a 3×4×4 grid are patches of 2×2 pixels
    patches = [x.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6).reshape(48, -1) for x in (first, second)]
    same = (patches[0] == patches[1]).all(1)
    assert not same[rows].any() and same.sum() == 48 - len(rows)


def test_tokens_to_compute_are_checked(pipe, run):
    with accelerate(pipe, "none") as handle, pytest.raises(AccelerateError, match="there are no region steps"):
        handle.compute_only(torch.tensor([1]))
    with accelerate(pipe, "none", regions=SOME) as handle:
        for wrong in (torch.tensor([1.5]), torch.tensor([[1]]), torch.tensor([], dtype=torch.int64)):
            with pytest.raises(AccelerateError, match=r"they must be int64 \[n\], not empty"):
                handle.compute_only(wrong)
        handle.compute_only(torch.tensor([3, 48]))
        with pytest.raises(ValueError, match="tokens 3 to 48 are not all of this grid; it has those from 0 to 47"):
            run(pipe)
        handle.compute_only(None)
        run(pipe)


def test_a_second_transformer_starts_with_keys_of_its_own(run):
    """The change between two transformers in the middle of region steps: all tokens once, then a part again."""
    pipe = make_pipe(transformer_2=make_transformer(), boundary_ratio=0.7)
    with accelerate(pipe, "none", regions="change:share=0.4,every=9,from=1") as handle:
        run(pipe, steps=8)
        assert any("no computed step before" in note for note in handle.report().fallbacks)
        assert len(handle.report().ages[7]) > 1


def test_velocities_are_those_of_the_scheduler(pipe, run):
    velocities = []
    with accelerate(pipe, "none") as handle:
        handle.watch_velocities(lambda velocity: velocities.append(velocity.clone()))
        latents = run(pipe, seed=5)
        sigmas = [*handle.sigmas, 0.0]
    x = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    for velocity, here, there in zip(velocities, sigmas, sigmas[1:], strict=False):
        x = x + (there - here) * velocity
    assert len(velocities) == 4
    torch.testing.assert_close(x, latents, atol=1e-5, rtol=1e-5)
    run(pipe)
    assert len(velocities) == 4


def test_branches_and_batch_entries_keep_to_themselves():
    family = Family("wan")
    with accelerate(family.pipe, "none", regions=SOME):
        together = family.run(batch=2, seed=3)
        noise = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(together, family.run(batch=2, latents=noise), atol=1e-5, rtol=1e-5)
        for entry in range(2):
            alone = family.run(batch=1, latents=noise[entry : entry + 1])
            torch.testing.assert_close(together[entry : entry + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("unit", ["token", "tile"])
def test_sparse_region_steps_are_those_of_the_sparse_step_before(unit):
    """At density 1 of every pattern a region step is dense in its rows."""
    pipe, text = make_pipe(), torch.randn(1, 12, 32)
    call = dict(
        prompt_embeds=text, negative_prompt_embeds=text, height=96, width=96, num_frames=9, guidance_scale=2.0,
        num_inference_steps=6, output_type="latent",
    )  # fmt: skip
    regions = f"change:share=0.5,from=1,every=3,unit={unit}"
    found = {}
    for pattern in ("dense", "pooled"):
        plan = Plan.uniform(pattern, 1.0 - 1e-9, block=16, tail="none")
        with accelerate(pipe, plan, regions=regions) as handle:
            found[pattern] = pipe(**call, generator=torch.Generator().manual_seed(1)).frames
            assert handle.report().steps["region"] == 4
    torch.testing.assert_close(found["pooled"], found["dense"], atol=1e-4, rtol=1e-3)


def test_a_constant_velocity_is_exact_for_any_share(pipe, run):
    """Euler with a field that does not change: what is not computed is right all the same."""
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    dense = run(pipe, steps=8)
    with accelerate(pipe, "none", regions="low_std:share=0.25,from=1,every=8"):
        torch.testing.assert_close(run(pipe, steps=8), dense, atol=1e-6, rtol=1e-6)


def test_importance_is_what_it_says():
    grid = (2, 3, 2)
    velocity, before = torch.randn(2, 5, 2, 6, 4), torch.randn(2, 5, 2, 6, 4)
    for focus, each in (
        ("high_std", velocity.std(1)), ("change", (velocity - before).square().mean(1)),
    ):  # fmt: skip
        patches = each.view(2, 2, 3, 2, 2, 2).mean((3, 5))
        pooled = torch.stack([(2 * patches[:, 0] + patches[:, 1]) / 3, (patches[:, 0] + 2 * patches[:, 1]) / 3], 1)
        torch.testing.assert_close(importance(velocity, before, grid, focus), pooled.flatten(1))
    low, high = (importance(velocity, None, grid, focus) for focus in ("low_std", "high_std"))
    assert torch.corrcoef(torch.stack([low[0], high[0]]))[0, 1] < 0
    assert importance(velocity, None, grid, "change").unique().numel() == 1
    sequence = importance(torch.randn(2, 5, 12), None, grid, "high_std")
    assert sequence.shape == (2, 12)


def test_ageing_starves_nobody():
    """RAS multiplies the score by which tokens are dropped, so what is dropped stays so; ours lets it return."""
    torch.manual_seed(torch.seed() % 2**31)
    value = torch.randn(1, 1024).exp()
    never = {}
    for name in ("theirs", "ours"):
        age, updated = torch.zeros(1, 1024), torch.zeros(1, 1024, dtype=torch.bool)
        for _ in range(25):
            if name == "ours":
                rows = tokens_of(aged(value, age + 1, 0.1, 12), 0.5)
                age = (age + 1).scatter(1, rows, 0.0)
                assert age.max() < 12 + 2
            else:
                dropped = (value * torch.exp(0.1 * age)).topk(512).indices  # highest scores are dropped, and age more
                age = age.scatter_add(1, dropped, torch.ones(1, 512))
                rows = torch.ones(1, 1024).scatter(1, dropped, 0.0).nonzero()[None, :, 1]
            updated.scatter_(1, rows, True)
        never[name] = 1 - float(updated.float().mean())
    assert never["ours"] == 0 and never["theirs"] > 0.4


def test_choices_have_one_size_and_are_the_greatest():
    score = torch.randn(3, 2000)
    rows = tokens_of(score, 0.3)
    assert rows.shape == (3, 640) and all(torch.equal(row, row.unique()) for row in rows)
    for entry in range(3):
        rest = score[entry].scatter(0, rows[entry], -math.inf)
        assert score[entry, rows[entry]].min() >= rest.max()
    order, bounds = torch.randperm(10), torch.tensor([0, 4, 7, 10])
    score = torch.zeros(2, 10)
    score[0, order[4:7]], score[1, order[7:10]], score[:, order[0]] = 1.0, 1.0, 2.0
    tiles = tiles_of(score, 0.3, order, bounds)
    assert tiles.shape == (2, 4)
    assert set(tiles[0].tolist()) == set(order[4:7].tolist()) and set(tiles[1].tolist()) == set(order[7:10].tolist())


def test_keys_in_eight_bits_are_close_and_rows_exact():
    k, v, rows = torch.randn(2, 9, 3, 16), torch.randn(2, 9, 3, 16), torch.tensor([[0, 4], [8, 2]])
    memory = {}
    keys.keep(memory, k, v, "fp8", 1.0, 1)
    new_k, new_v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    found_k, found_v = keys.renewed(memory, rows, new_k, new_v, 0.5, 1)
    for found, old, new in ((found_k, k, new_k), (found_v, v, new_v)):
        index = rows[:, :, None, None].expand(-1, -1, 3, 16)
        assert torch.equal(found.gather(1, index), new)
        kept = old.scatter(1, index, new)
        assert (found - kept).abs().max() <= 0.07 * kept.abs().max() and not torch.equal(found, kept)
    assert held_bytes(memory) == 2 * k.numel() + 2 * 2 * 3 * 4


@pytest.mark.parametrize("how", ["full", "fp8"])
def test_lines_through_two_steps_stand_in_for_keys(how):
    """By definition, no further on than the two lie apart; rows stand beside them and are not kept."""
    steps = [(1.0, torch.randn(2, 9, 3, 16)), (0.8, torch.randn(2, 9, 3, 16)), (0.7, torch.randn(2, 9, 3, 16))]
    rows, new, memory = torch.tensor([[0, 4], [8, 2]]), torch.randn(2, 2, 3, 16), {}
    index = rows[:, :, None, None].expand(-1, -1, 3, 16)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if how == "full" else {"atol": 0.8, "rtol": 0.0}
    keys.keep(memory, steps[0][1], -steps[0][1], how, 1.0, 2)
    found, _ = keys.renewed(memory, rows, new, new, 0.9, 2)
    torch.testing.assert_close(found, steps[0][1].scatter(1, index, new), **tolerance)
    for at, x in steps[1:]:
        keys.keep(memory, x, -x, how, at, 2)
    for at, slope in ((0.65, 0.5), (0.6, 1.0), (0.2, 1.0)):
        expected = (steps[2][1] + slope * (steps[2][1] - steps[1][1])).scatter(1, index, new)
        every_k, every_v = keys.renewed(memory, rows, new, -new, at, 2)
        torch.testing.assert_close(every_k, expected, **tolerance)
        torch.testing.assert_close(every_v, -every_k, atol=1e-6, rtol=1e-6)


def test_a_step_that_is_kept_twice_counts_once():
    memory, x = {}, torch.randn(1, 4, 2, 8)
    for _ in range(3):
        keys.keep(memory, x, x, "full", 0.5, 2)
    found, _ = keys.renewed(memory, torch.tensor([[0]]), x[:, :1], x[:, :1], 0.4, 2)
    assert torch.equal(found, x)


@pytest.mark.slow
def test_lines_are_nearer_than_old_keys():
    """On the embedded model's full grid: a clip with region steps is nearer to the dense one."""
    pipe, clips = load_pipeline("embedded"), {}
    for how in ("none", "easy:predictor=last", "easy:predictor=taylor"):
        with accelerate(pipe, "none", regions=how):
            clips[how] = pipe(
                "a red circle moving left on black", num_inference_steps=20, height=176, width=176, num_frames=33,
                guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="np",
            ).frames  # fmt: skip
    dense, last, line = clips.values()
    assert 10 * np.square(line - dense).mean() < np.square(last - dense).mean()


def test_keys_that_are_made_anew_are_those_that_were_kept(run):
    """Of what went into each layer, with the chosen tokens' rows renewed: the same keys, at half the memory."""
    for batch, guidance in ((1, 1.0), (2, 3.0)):
        pipe, found, held = make_pipe(transformer=make_transformer(layers=6)), {}, {}
        dense = run(pipe, steps=6, size=96, batch=batch, guidance=guidance)
        for how in ("full", "input"):
            with accelerate(pipe, "none", regions=f"{SOME},keys={how},predictor=last") as handle:
                found[how] = run(pipe, steps=6, size=96, batch=batch, guidance=guidance)
                held[how] = handle.report().held["regions"]
        torch.testing.assert_close(found["input"], found["full"], atol=1e-5, rtol=1e-4)
        assert not torch.equal(found["full"], dense) and held["input"] < 0.8 * held["full"]
        assert torch.equal(run(pipe, steps=6, size=96, batch=batch, guidance=guidance), dense)


def test_keys_made_anew_go_with_sparse_steps(run):
    plan, found = Plan.uniform("pooled", 0.6, block=16, tail="none"), {}
    pipe = make_pipe()
    for how in ("full", "input"):
        with accelerate(pipe, plan, regions=f"{SOME},keys={how},predictor=last") as handle:
            found[how] = run(pipe, steps=6, size=96)
            assert {"sparse", "region"} <= set(handle.report().kinds)
    torch.testing.assert_close(found["input"], found["full"], atol=1e-5, rtol=1e-4)


def test_layers_without_keys_see_the_chosen_tokens_alone(run):
    """Of one layer none keeps keys with half of the layers: its attention is over the rows."""
    assert Regions(layers=0.5).keeps(4) == ("none", "full", "none", "full")
    assert Regions(layers=1 / 3).keeps(6).count("full") == 2 and set(Regions(layers=1.0).keeps(3)) == {"full"}
    assert Regions(layers=0.7, keys="fp8").keeps(10).count("fp8") == 7
    pipe, rows, found, active = make_pipe(transformer=make_transformer(layers=1)), torch.tensor([1, 7, 30]), [], []
    with accelerate(pipe, "none", regions="change:share=0.1,max_age=10,from=1,every=9,layers=0.5") as handle:
        handle.compute_only(rows)
        attention = pipe.transformer.blocks[0].attn1
        hooks = [
            attention.to_out[0].register_forward_pre_hook(lambda module, args: found.append(args[0])),
            attention.register_forward_pre_hook(lambda module, args: active.append(args)),
        ]
        run(pipe, steps=2, guidance=1.0)
        for hook in hooks:
            hook.remove()
    alone = attention(*active[1])  # not accelerated any more: the rows' own queries, keys and values
    torch.testing.assert_close(attention.to_out[0](found[1]), alone, atol=1e-5, rtol=1e-4)
    assert found[1].shape[1] == 3 and handle._runtime.held(" keys") == 0
    pipe = make_pipe(transformer=make_transformer(layers=4))
    with accelerate(pipe, Plan.uniform("pooled", 0.6, block=16), regions=f"{SOME},layers=0.5") as handle:
        run(pipe, steps=6)
        assert handle.report().steps["region"] == 4
    kept = {}
    for layers in (1.0, 0.5):
        with accelerate(pipe, "none", regions=f"{SOME},layers={layers}") as handle:
            kept[layers] = (run(pipe, steps=6), handle.report().held["regions"])
    assert not torch.equal(kept[1.0][0], kept[0.5][0]) and kept[0.5][1] < 0.75 * kept[1.0][1]


@pytest.mark.parametrize("how", ["full", "fp8", "input"])
@pytest.mark.parametrize("layers", [1.0, 0.5])
@pytest.mark.parametrize(("batch", "guidance", "plan"), [(1, 1.0, "none"), (2, 3.0, "none"), (2, 3.0, "sparse")])
def test_memory_is_as_predicted(run, how, layers, batch, guidance, plan):
    """Before anything is kept, and within 5 % of what was kept at most."""
    pipe = make_pipe(transformer=make_transformer(layers=4))
    wish = Plan.uniform("pooled", 0.4, block=16) if plan == "sparse" else plan
    with accelerate(pipe, wish, regions=f"{SOME},keys={how},layers={layers}") as handle:
        told = []

        def look(pipe, step, timestep, tensors):
            told.append(handle._runtime.record.predicted["regions"])
            return tensors

        run(pipe, steps=6, size=128, batch=batch, guidance=guidance, callback_on_step_end=look)
        report = handle.report()
    assert len(set(told)) == 1 and report.predicted["regions"] == told[0]
    assert report.held["regions"] == pytest.approx(told[0], rel=0.05)


@pytest.mark.parametrize("keys", ["full", "fp8", "input"])
def test_memory_is_as_predicted_on_the_embedded_model(keys):
    """On its small grid: keys of six layers, and the residuals of a cache beside them."""
    pipe = load_pipeline("embedded")
    pipe.set_progress_bar_config(disable=True)
    cache = Caching("magnitude", (("curve", (1.0,)), ("threshold", 0.0)), predictor="taylor")
    with accelerate(pipe, "none", regions=f"{SOME},keys={keys}", cache=cache) as handle:
        pipe("a red circle on black", height=64, width=64, num_frames=17, num_inference_steps=4, output_type="latent")
        report = handle.report()
    assert report.steps["region"] == 2
    for part in ("regions", "step cache"):
        assert report.held[part] == pytest.approx(report.predicted[part], rel=0.05)


def test_what_cannot_fit_is_refused_with_what_to_do(run, monkeypatch):
    pipe = make_pipe()
    dense = run(pipe)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 300_000)
    with accelerate(pipe, "none", regions=SOME) as handle:
        with pytest.raises(MemoryError) as error:
            run(pipe, size=128, guidance=3.0)
        assert handle._runtime.held(" keys") == 0
        sentence = str(error.value)
        assert "3×8×8 tokens of 1 clips need in 2 layers and 2 guidance branches, which takes 0.4 MiB" in sentence
        assert "cpu has 0.3 MiB free; keys=fp8 needs 0.2 MiB, keys=input needs 0.3 MiB, layers=0.5 needs" in sentence
        assert "regions='none' nothing" in sentence
        run(pipe)  # a smaller clip fits
        with pytest.raises(MemoryError, match=r"which takes 0.6 MiB, .* predictor=last needs 0.4 MiB, keys=fp8 needs"):
            run(pipe, size=128, guidance=3.0, steps=5)
    with accelerate(pipe, "none", regions=f"{SOME},keys=fp8") as handle:
        run(pipe, size=128, guidance=3.0)
        assert handle.report().held["regions"] < 300_000
    monkeypatch.undo()
    assert torch.equal(run(pipe), dense)


def test_text_is_read_or_refused():
    policy, schedule = Regions.parse(
        "low_std:share=0.25,age=0.5,max_age=9,unit=tile,keys=fp8,predictor=last,from=0.9,to=0.1,every=2"
    )
    assert policy == Regions(0.25, "low_std", "tile", 0.5, 9, "fp8", "last")
    assert schedule == {"region_from": 0.9, "region_to": 0.1, "region_every": 2}
    for text, message in (
        ("all", "regions 'all' are unknown; allowed are auto, none, easy, change"),
        ("change:share=0", "share is 0.0; it must be a number above 0"),
        ("change:share=x", "share is 'x'; it must be a number"),
        ("change:share=0.1,max_age=3", "reaches all tokens in 10 steps, which is more than max_age 3"),
        ("change:unit=row", "unit is 'row'; allowed are token, tile"),
        ("change:layers=0", "layers is 0.0; it must be a number above 0"),
        ("change:predictor=parabola", "predictor is 'parabola'; allowed are last, taylor"),
        ("change:keys=half", "keys is 'half'; allowed are full, fp8, input"),
        ("change:size=3", "region option 'size=3' is none; give NAME=VALUE with one of share"),
    ):
        with pytest.raises(RegionsError, match=message):
            Regions.parse(text)


def test_a_plan_holds_its_regions(tmp_path, pipe):
    plan = replace(
        Plan.uniform("pooled", 0.3), regions=Regions(0.25), schedule=Schedule(region_from=0.9, region_every=2)
    )
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan == Plan.from_json(plan.to_json())
    with pytest.raises(PlanError, match="regions must say which tokens"):
        replace(plan, regions=None)
    with pytest.raises(PlanError, match="hoist must be empty"):
        replace(plan, hoist="frames")
    with accelerate(pipe, plan, regions="none") as handle:
        assert handle._choice.plan.regions is None and handle._choice.plan.schedule.region_from == 0


def points_of(pipe, run, steps):
    """Shares of the first sigma at some of eight steps."""
    with accelerate(pipe, "none") as handle:
        run(pipe, steps=8)
        return tuple(handle.sigmas[step] / handle.sigmas[0] for step in steps)


def test_a_schedule_names_the_steps_behind_which_regions_are(run):
    pipe = make_pipe()
    points = points_of(pipe, run, (0, 1, 3, 6))
    plan = replace(
        Plan.uniform("dense", 1.0), regions=Regions(0.4), schedule=Schedule(computed=points, region_after=points[1:2])
    )
    assert Plan.from_json(plan.to_json()) == plan
    with accelerate(pipe, plan) as handle:
        run(pipe, steps=8)
        assert handle.report().kinds == ("dense", "dense", "region", "dense", "cached", "cached", "dense", "cached")
        run(pipe, steps=16)  # between the same sigmas
        kinds, sigmas = handle.report().kinds, handle.sigmas
        shares = [sigma / sigmas[0] for sigma in sigmas]
        inside = [points[2] < share < points[1] for share in shares]
        assert "region" in kinds
        assert all(kind in ("region", "dense") for kind, within in zip(kinds, inside, strict=True) if within)
    with accelerate(pipe, plan, regions="none") as handle:
        run(pipe, steps=8)
        assert handle.report().kinds == ("dense", "dense", "cached", "dense", "cached", "cached", "dense", "cached")
    with accelerate(pipe, plan, cache="none") as handle:  # all of what stands beside computed steps is taken away
        run(pipe, steps=8)
        assert handle.report().kinds == ("dense",) * 8
    with accelerate(pipe, plan, regions=Regions(0.5)) as handle:
        assert handle._choice.plan.schedule == plan.schedule and handle._choice.plan.regions == Regions(0.5)
    for cache in ("none", "rate:threshold=0.01"):  # the plan's own region steps end with its reused ones
        with accelerate(pipe, plan, regions=Regions(0.5), cache=cache) as handle:
            run(pipe, steps=8)
            assert "region" in handle.report().kinds
    with pytest.raises(PlanError, match=r"region_after is .* it must hold numbers of computed"):
        replace(plan, schedule=Schedule(computed=points, region_after=(0.123,)))
    with pytest.raises(PlanError, match="regions must say which tokens"):
        replace(plan, regions=None)


def test_sparse_steps_behind_regions_know_the_dense_step_before(run):
    """The residual and what patterns learn are of the last dense step, although region steps come between."""
    pipe = make_pipe()
    points = points_of(pipe, run, (0, 1, 4, 7))
    plan = replace(
        Plan.uniform("pooled", 0.5, block=16), residual=True, regions=Regions(0.4), break_even=False,
        schedule=Schedule(dense_steps=2, computed=points, region_after=points[1:]),
    )  # fmt: skip
    with accelerate(pipe, plan) as handle:
        run(pipe, steps=8)
        report = handle.report()
    kinds = ("dense", "dense", "region", "region", "sparse", "region", "region", "sparse")
    assert report.kinds == kinds and not report.fallbacks


def test_caches_and_regions_take_turns(run):
    """A cached step after a region step would bring back older tokens, so it is computed."""
    pipe = make_pipe()
    with accelerate(
        pipe, "none", regions="change:share=0.4,every=2,from=1", cache="rate:threshold=1000,first=0"
    ) as handle:
        run(pipe, steps=10)
        kinds = handle.report().kinds
    assert "region" in kinds and "cached" not in kinds[1:]
    with accelerate(
        pipe, "none", regions="change:share=0.4,every=2,from=0.5", cache="rate:threshold=1000,first=0.3"
    ) as handle:
        run(pipe, steps=10)
        kinds = handle.report().kinds
    assert "region" in kinds and "cached" in kinds
    assert all(b != "cached" for a, b in pairwise(kinds) if a == "region")


def test_models_and_samplers_that_cannot_are_refused():
    family = Family("cosmos")
    with pytest.raises(AccelerateError, match="regions are not known for Cosmos"):
        accelerate(family.pipe, "none", regions="easy")
    pipe = make_pipe(scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    with pytest.raises(AccelerateError, match="adds noise of its own"):
        accelerate(pipe, "none", regions="easy")
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with accelerate(pipe, "none", regions="easy") as handle:
        assert any("UniPCMultistepScheduler" in note for note in handle.report().fallbacks)


def test_the_step_before_a_region_is_computed_whatever_the_cache_wishes(run):
    pipe = make_pipe()
    regions, always = "change:share=0.4,every=3,from=0.7,to=0.2", "rate:threshold=1000,first=0.1"
    with accelerate(pipe, "none", regions=regions, cache=always) as handle:
        run(pipe, steps=16)
        kinds, notes = handle.report().kinds, handle.report().fallbacks
    first = kinds.index("region")
    assert kinds[first - 1] == "dense" and "cached" in kinds[:first] and not notes


def test_its_timeline_is_drawn(run, tmp_path):
    pipe = make_pipe()
    with accelerate(pipe, "none", regions=SOME, cache="rate:threshold=0.5") as handle:
        with pytest.raises(ValueError, match="run the pipeline first"):
            write_timeline(handle.report(), tmp_path / "none.png")
        run(pipe, steps=8)
        report = handle.report()
        write_timeline(report, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.refreshed) == 48 and 0.3 <= min(report.refreshed) < max(report.refreshed) <= 1


def test_regions_that_are_asked_for_stand_in_place_of_reused_steps():
    from pointillist import load_pipeline

    pipe = load_pipeline("embedded")
    call = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 12, "output_type": "latent"}
    with accelerate(pipe, "balanced", regions="easy") as handle:
        pipe("a red circle", **call)
        steps = handle.report().steps
    assert steps["region"] >= 4 and steps["cached"] == 0
    with accelerate(pipe, "balanced") as handle:
        pipe("a red circle", **call)
        assert handle.report().steps["cached"] > 0
