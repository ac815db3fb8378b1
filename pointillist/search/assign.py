"""Which candidate every head gets: the least error within a time budget.

A multiple-choice knapsack with set-up costs. At a price λ in error per second every site decides for itself, and one
bisection finds the price at which the budget is spent (Lagrangian relaxation); what is left of the budget then buys
the best single improvements. On the problems of `tests/search/test_assign.py`, whose judge is `scipy.optimize.milp`,
the error is above the optimum by 0.08 % in the median and 3.1 % at worst without set-up costs, by 1.1 % and 4.9 % with
them; it takes milliseconds instead of minutes.

Heads of a site with equal rules share what a rule costs once: choosing its pairs takes operators, whatever the heads.
"""

from dataclasses import dataclass

import numpy as np

BISECTIONS = 60


@dataclass(frozen=True)
class Problem:
    """Places are sites in step buckets: everything that decides for itself."""

    errors: np.ndarray
    """[places, heads, candidates]: what a choice adds to the error of the whole."""
    per_head: np.ndarray
    """[places, candidates]: seconds that a head with it adds."""
    fixed: np.ndarray
    """[places, candidates]: seconds that it costs once if any head of the place has it."""
    sparse: np.ndarray
    """[places]: seconds of a place in which not all heads are dense."""
    dense: np.ndarray
    """[places]: seconds of a place all of whose heads are dense; then it has no error. Candidate 0 is dense."""

    def seconds(self, chosen: np.ndarray) -> np.ndarray:
        """[places]: what `chosen` [places, heads] takes."""
        places = np.arange(len(chosen))
        each = np.take_along_axis(self.per_head, chosen, 1).sum(1) + self.sparse
        used = np.zeros(self.fixed.shape, dtype=bool)
        used[places[:, None], chosen] = True
        return np.where((chosen == 0).all(1), self.dense, each + (self.fixed * used).sum(1))

    def error(self, chosen: np.ndarray) -> float:
        """What `chosen` [places, heads] adds up to."""
        return float(np.take_along_axis(self.errors, chosen[:, :, None], 2).sum())


class OverBudget(ValueError):
    """No choice is within the budget; `least` is the time of the fastest one."""

    def __init__(self, budget: float, least: float) -> None:
        super().__init__(f"no choice takes at most {budget:.4g} s; the fastest takes {least:.4g} s")
        self.least = least


def assign(problem: Problem, budget: float) -> np.ndarray:
    """int64 [places, heads]: candidates whose seconds add up to at most `budget`. Raises OverBudget."""
    if problem.dense.sum() <= budget:
        return np.zeros(problem.errors.shape[:2], dtype=np.int64)
    low, high = 0.0, 1.0
    while problem.seconds(best := at_price(problem, high)).sum() > budget:
        low, high = high, high * 10
        if high > 1e30:
            raise OverBudget(budget, float(problem.seconds(best).sum()))
    for _ in range(BISECTIONS):
        price = (low + high) / 2 if low == 0 else (low * high) ** 0.5
        chosen = at_price(problem, price)
        if problem.seconds(chosen).sum() <= budget:
            high, best = price, chosen
        else:
            low = price
    return improve(problem, best, budget)


def at_price(problem: Problem, price: float) -> np.ndarray:
    """int64 [places, heads]: the least error plus price × seconds of every place."""
    return np.stack([_cheapest(problem, place, price) for place in range(len(problem.errors))])


def improve(problem: Problem, chosen: np.ndarray, budget: float) -> np.ndarray:
    """Spend what is left of the budget on single heads, first where a second saves most error."""
    chosen = chosen.copy()
    heads = np.arange(chosen.shape[1])
    left = budget - problem.seconds(chosen).sum()
    sparse = ~(chosen == 0).all(1)
    while True:
        saved = np.take_along_axis(problem.errors, chosen[:, :, None], 2) - problem.errors
        used = np.zeros(problem.fixed.shape, dtype=bool)
        used[np.arange(len(chosen))[:, None], chosen] = True
        more = problem.per_head[:, None] - np.take_along_axis(problem.per_head, chosen, 1)[:, :, None]
        more = more + np.where(used, 0, problem.fixed)[:, None]
        worth = np.where((saved > 0) & (more <= left) & sparse[:, None, None], saved / np.maximum(more, 1e-12), 0)
        place, head, candidate = np.unravel_index(worth.argmax(), worth.shape)
        if worth[place, head, candidate] <= 0:
            return chosen
        trial = np.where(heads == head, candidate, chosen[place])
        if (trial == 0).all():  # the place would be dense, which is another sum
            sparse[place] = False
            continue
        chosen[place] = trial
        left = budget - problem.seconds(chosen).sum()


def _cheapest(problem: Problem, place: int, price: float) -> np.ndarray:
    """The choice of one place at a price: as many different candidates as are worth what each costs once."""
    value = problem.errors[place] + price * problem.per_head[place]
    fixed = price * problem.fixed[place]

    def total(used: list[int]) -> float:
        return value[:, used].min(1).sum() + fixed[used].sum()

    best = sorted(set((value + fixed / len(value)).argmin(1).tolist()))
    while len(best) > 1:
        fewer = min(([each for each in best if each != gone] for gone in best), key=total)
        if total(fewer) >= total(best):
            break
        best = fewer
    alone = [int((value.sum(0) + fixed).argmin())]
    while len(alone) < len(fixed):
        with_one_more = np.minimum(value[:, alone].min(1)[:, None], value).sum(0) + fixed[alone].sum() + fixed
        with_one_more[alone] = np.inf
        if with_one_more.min() >= total(alone):
            break
        alone.append(int(with_one_more.argmin()))
    best = min(best, alone, key=total)
    if price * problem.dense[place] <= total(best) + price * problem.sparse[place]:
        return np.zeros(len(value), dtype=np.int64)
    return np.array(best)[value[:, best].argmin(1)]
