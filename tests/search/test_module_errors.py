"""What reusing each module costs: against its definition on a tiny pipeline, and tables against all there are."""

import itertools

import numpy as np
import pytest
import torch

from families import Family
from pointillist import accelerate
from pointillist.accel.conflicts import targets_of
from pointillist.accel.step_cache.table import CacheTable
from pointillist.search.cache_table import KINDS, guided
from pointillist.search.module_errors import AGES, OLDEST, _by_age, best_modules, measure_modules, together


def of_branches(outputs):
    return guided(outputs, 3.0)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_vectors_are_their_definition(name):
    """Of a module at a step: a table that reuses it there alone changes the guided output by it, times one number."""
    family, steps, layers = Family(name), 4, {"wan": 2, "ltx": 4}[name]
    targets = targets_of(family.pipe, sparse=False)
    family.run(steps=1)  # Diffusers leaves marks of its own
    before = [set(vars(module)) for module in family.pipe.transformer.modules()]
    vectors = measure_modules(lambda: family.run(steps=steps), family.pipe, targets, of_branches, KINDS)
    assert [set(vars(module)) for module in family.pipe.transformer.modules()] == before
    assert vectors.shape[:3] == (steps, 2 * layers, len(AGES)) and not vectors[0].any() and not vectors[1, :, 1:].any()

    def outputs(table):
        seen = []
        with accelerate(family.pipe, "none", cache=table) as handle:
            handle.watch_velocities(lambda velocity: seen.append(velocity.clone()))
            family.run(steps=steps)
        return seen

    dense, scales = outputs(CacheTable.every(steps, layers, 1)), []
    for layer, kind in ((0, "attention"), (layers - 1, "mlp")):
        rows = {each: ["1" * layers] * steps for each in KINDS}
        digits = list("1" * layers)
        digits[layer] = "0"
        rows[kind][2] = "".join(digits)
        changed = outputs(CacheTable(tuple(rows["attention"]), tuple(rows["mlp"])))[2] - dense[2]
        vector = torch.from_numpy(vectors[2, 2 * layer + KINDS.index(kind), 0]).double()
        change = changed.flatten().double()
        index = torch.randperm(len(change), generator=torch.Generator().manual_seed(0))[: len(vector)].sort().values
        change = change[index]
        assert torch.corrcoef(torch.stack([change, vector]))[0, 1] > 0.999
        scales.append(float(vector.norm() / change.norm()))
    assert scales[0] == pytest.approx(scales[1], rel=1e-3)  # the step's length, times how much the clip feels it


def test_how_much_a_step_is_felt_is_the_geometric_mean_of_clips():
    clips = [np.random.default_rng(i).normal(size=(5, 2, 4, 6)).astype(np.float32) * 10**i for i in range(3)]
    found = together(clips)
    sizes = np.sqrt(np.square(found).mean((2, 3, 4)))
    assert np.allclose(sizes, sizes[0], rtol=1e-4)  # in every clip alike
    means = [np.sqrt(np.square(clip).mean((1, 2, 3))) for clip in clips]
    assert np.allclose(sizes[0], np.exp(np.log(means).mean(0)), rtol=1e-4)


def test_ages_between_are_interpolated():
    vectors = np.zeros((1, 10, 1, len(AGES), 1), np.float32)
    vectors[0, :, 0, :, 0] = [1, 3, 7, 13]
    found = _by_age(vectors)[0, :, 0, :, 0]
    assert found[9].tolist() == pytest.approx([0, 1, 3, 5, 7, 9, 11, 13, 13 * 8 / 7], rel=1e-5)
    assert found[3, :4].tolist() == pytest.approx([0, 1, 3, 4.5]) and found[1, 1] == 1 and len(found[0]) == OLDEST + 1


def error(vectors, computed):
    """The definition, slowly."""
    by_age, (clips, steps, modules) = _by_age(vectors), vectors.shape[:3]
    total = 0.0
    for clip in range(clips):
        sums = []
        for step in range(1, steps):
            ages = [step - max(i for i in range(step + 1) if computed[i, module]) for module in range(modules)]
            sums.append(sum(by_age[clip, step, module, min(age, OLDEST)] for module, age in enumerate(ages)))
        lengths = sum(np.sqrt(np.square(each).mean()) for each in sums)
        total += (np.square(sum(sums)).mean() + lengths**2) / 2
    return total / clips


@pytest.mark.parametrize("seed", range(3))
def test_a_table_is_near_the_best_of_all(seed):
    """All tables of 5 steps and 2 modules: 8 free places."""
    torch.manual_seed(seed)
    steps, modules, reused = 5, 2, 4
    vectors = torch.randn(2, steps, modules, len(AGES), 3).numpy() * np.array([1, 2, 3, 4])[:, None]
    vectors *= np.random.default_rng(seed).uniform(0.2, 3, (1, steps, modules, 1, 1))
    errors = {}
    for chosen in itertools.combinations(range((steps - 1) * modules), reused):
        computed = np.ones((steps, modules), bool)
        computed[1:].flat[list(chosen)] = False
        errors[chosen] = error(vectors, computed)
    found = best_modules(vectors.astype(np.float32), reused)
    assert found[0].all() and (~found).sum() == reused
    mine = error(vectors, found)
    assert min(errors.values()) * 0.999 <= mine <= sorted(errors.values())[len(errors) // 10]


def test_what_matters_is_computed():
    """One step whose errors are great: none of its modules is reused, whatever the intervals say."""
    vectors = np.ones((1, 8, 3, len(AGES), 5), np.float32) * np.array([1, 2, 3, 4], np.float32)[:, None]
    vectors[:, 5] *= 100
    computed = best_modules(vectors, 12)
    assert computed[5].all() and (~computed).sum() == 12
    assert best_modules(vectors, 0).all() and best_modules(vectors, 21)[1:].sum() == 0
    with pytest.raises(ValueError, match="22 modules cannot be reused; of 8 steps and 3 modules 21 can"):
        best_modules(vectors, 22)
