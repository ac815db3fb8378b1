"""Heads over processes, so that none waits long for another.

After every attention all processes meet, so a layer takes as long as its slowest process. What heads cost is known from
the plan: the share of the pairs that they compute, summed over the steps. Longest processing time first: the costliest
head goes to the process that has least to do and still has room.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pointillist.accel.plan import Plan, Rule

OVERHEAD = 0.02
"""What a head costs beside its pairs, in dense heads: laying out and looking up."""
STEPS = 100
"""Steps that a schedule is sampled at, where they are not known."""


@dataclass(frozen=True)
class Balance:
    """The cost of the process that has most to do, over the mean of all: how much longer than needed a layer takes."""

    before: float
    """With the heads in the model's own order."""
    after: float
    """As they are spread."""


def head_counts(heads: int, processes: int) -> list[int]:
    """Heads of each process: equally many, or a few fewer in the last. Raises ValueError where that cannot be."""
    most = math.ceil(heads / processes)
    missing = most * processes - heads
    if missing >= most:
        fits = [n for n in range(2, heads + 1) if heads % n == 0]
        raise ValueError(
            f"{heads} heads cannot be spread over {processes} processes (ulysses); possible are "
            f"{', '.join(map(str, fits)) or 'none'}; the rest may be a ring (--ring)"
        )
    return [most] * (processes - 1) + [most - missing]


def spread(costs: Sequence[float], processes: int) -> tuple[int, ...]:
    """The order of the heads in which each process gets its own in a row. Equal costs leave the order as it is."""
    counts = head_counts(len(costs), processes)
    if max(costs) == min(costs):
        return tuple(range(len(costs)))
    mine: list[list[int]] = [[] for _ in counts]
    loads = [0.0] * processes
    for head in sorted(range(len(costs)), key=lambda head: (-costs[head], head)):
        free = [process for process in range(processes) if len(mine[process]) < counts[process]]
        least = min(free, key=lambda process: (loads[process], process))
        mine[least].append(head)
        loads[least] += costs[head]
    order, plain = tuple(head for heads in mine for head in sorted(heads)), tuple(range(len(costs)))
    return order if imbalance(costs, order, processes) < imbalance(costs, plain, processes) else plain


def imbalance(costs: Sequence[float], order: Sequence[int], processes: int) -> float:
    """The cost of the process that has most to do, over the mean of all; 1 where there is nothing to do."""
    return _most(costs, order, processes) * processes / (sum(costs) or processes)


def _most(costs: Sequence[float], order: Sequence[int], processes: int) -> float:
    loads, start = [], 0
    for count in head_counts(len(costs), processes):
        loads.append(sum(costs[head] for head in order[start : start + count]))
        start += count
    return max(loads)


def head_costs(plan: Plan | None, layer: int, heads: int, transformer: str, sigmas: Sequence[float]) -> list[float]:
    """What each head of a layer costs in a generation, in dense heads and steps; steps that reuse cost nothing."""
    steps = tuple(sigmas) or tuple(1 - step / STEPS for step in range(STEPS))
    costs = [0.0] * heads
    for step, sigma in enumerate(steps):
        kind = "dense" if plan is None else plan.schedule.kind(step, steps)
        if plan is None or kind == "dense":
            found = [1.0] * heads
        elif kind == "cached":
            continue
        elif kind == "region":  # of a part of the tokens, over all keys
            found = [1.0 if plan.regions is None else plan.regions.share] * heads
        else:
            found = [rule.kept for rule in each_head(plan.rules(layer, sigma / steps[0], transformer), heads)]
        costs = [cost + more + OVERHEAD for cost, more in zip(costs, found, strict=True)]
    return costs


def each_head(rules: Sequence[Rule], heads: int) -> tuple[Rule, ...]:
    """One rule for every head, from one for all or one for each."""
    return tuple(rules) * heads if len(rules) == 1 else tuple(rules)


def balance_of(
    plan: Plan | None, layers: int, heads: int, processes: int, transformer: str, sigmas: Sequence[float] = ()
) -> Balance:
    """Of all layers one after the other, as processes meet in each. Raises ValueError where heads cannot be spread so.

    Args:
        sigmas: of all steps; a schedule of many steps where they are not known.
    """
    before = after = mean = 0.0
    for layer in range(layers):
        costs = head_costs(plan, layer, heads, transformer, sigmas)
        before += _most(costs, range(heads), processes)
        after += _most(costs, spread(costs, processes), processes)
        mean += sum(costs) / processes
    return Balance(before / mean, after / mean)
