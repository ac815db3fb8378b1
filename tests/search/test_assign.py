"""The assignment against an exact solver, and its budget."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from pointillist.search.assign import OverBudget, Problem, assign


def make_problem(rng, places=8, heads=4, candidates=7, shared=True):
    """Candidates as they are: dense first, the others faster and worse by very unequal amounts."""
    density = np.concatenate([[1.0, 0.02], rng.uniform(0.05, 0.7, candidates - 2)])
    errors = (1 - density) ** 2 * rng.lognormal(0, 1.5, (places, heads, candidates))
    per_head = np.outer(rng.uniform(0.8, 1.2, places), density)
    fixed = rng.uniform(0, 0.4, (places, candidates)) if shared else np.zeros((places, candidates))
    fixed[:, 0] = 0
    return Problem(errors, per_head, fixed, np.full(places, 0.05), per_head[:, 0] * heads)


def exact(problem, budget):
    """The least error by mixed-integer programming, with places that are all dense as choices of their own."""
    places, heads, candidates = problem.errors.shape
    choices, used = places * heads * candidates, places * candidates
    size = choices + used + places  # x: a head's choice, y: a place uses a candidate, z: a place is dense
    cost = np.concatenate([problem.errors.ravel(), np.zeros(used + places)])
    rows, low, high = [], [], []

    def add(entries, least, most):
        row = np.zeros(size)
        for index, value in entries:
            row[index] += value
        rows.append(row), low.append(least), high.append(most)

    def x(p, h, c):
        return (p * heads + h) * candidates + c

    for p in range(places):
        z = choices + used + p
        for h in range(heads):
            add([*((x(p, h, c), 1) for c in range(candidates)), (z, 1)], 1, 1)
            for c in range(candidates):
                add([(choices + p * candidates + c, 1), (x(p, h, c), -1)], 0, np.inf)
    seconds = [
        *((x(p, h, c), problem.per_head[p, c]) for p in range(places) for h in range(heads) for c in range(candidates)),
        *((choices + p * candidates + c, problem.fixed[p, c]) for p in range(places) for c in range(candidates)),
        *((choices + used + p, problem.dense[p] - problem.sparse[p]) for p in range(places)),
    ]
    add(seconds, 0, budget - problem.sparse.sum())
    result = milp(
        cost, constraints=LinearConstraint(np.array(rows), low, high), integrality=np.ones(size), bounds=Bounds(0, 1)
    )
    assert result.success, result.message
    return result.fun


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_close_to_the_exact_optimum(shared, share):
    gaps = []
    for seed in np.random.default_rng().integers(0, 2**31, 4):
        rng = np.random.default_rng(seed)
        problem = make_problem(rng, shared=shared)
        budget = share * problem.dense.sum()
        chosen = assign(problem, budget)
        assert problem.seconds(chosen).sum() <= budget * (1 + 1e-12)
        best = exact(problem, budget)
        assert problem.error(chosen) >= best * (1 - 1e-6), seed
        gaps.append(problem.error(chosen) / best - 1)
    assert np.median(gaps) < 0.06, gaps


def test_more_time_never_makes_it_worse_by_much():
    problem = make_problem(np.random.default_rng(), places=20)
    errors = [problem.error(assign(problem, share * problem.dense.sum())) for share in np.linspace(0.15, 1, 12)]
    assert all(after <= before * 1.05 for before, after in pairwise(errors)), errors
    assert errors[-1] == 0


def test_a_budget_that_nothing_meets_says_what_can_be_had():
    problem = make_problem(np.random.default_rng())
    with pytest.raises(OverBudget, match="no choice takes at most") as caught:
        assign(problem, 0.01)
    assert caught.value.least > 0.01
    assert problem.seconds(assign(problem, caught.value.least * 1.0001)).sum() <= caught.value.least * 1.0001


def test_what_a_rule_costs_once_is_shared():
    """With a high price of variety all heads of a place agree, although each has a favourite of its own."""
    heads = 4
    errors = np.ones((1, heads, heads + 1))
    errors[0, range(heads), range(1, heads + 1)] = 0.9
    errors[0, :, 0] = 0
    per_head = np.array([[1.0] + [0.1] * heads])
    cheap, dear = (Problem(errors, per_head, np.full((1, heads + 1), f), np.zeros(1), np.full(1, 4.0)) for f in (0, 1))
    assert len(set(assign(cheap, 0.5)[0])) == heads
    assert len(set(assign(dear, 1.5)[0])) == 1
