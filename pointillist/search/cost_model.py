"""Seconds of a site's attention call on a machine, from what it does and how fast the machine does it.

    seconds = Σ  how much of something the call does  ×  seconds that one of it takes

The first factor is counted (`work.py`), the second follows from a `HardwareProfile` (`seconds_per`). It is a sum, not
the largest of its terms, because little overlaps: within a program of the kernel in Triton no exponential runs beside
a matrix product, and a CPU does one thing at a time. So a profile is a fit of non-negative coefficients
(`calibrate.py`), and one from data sheets needs no more than peaks, what of them is reached, and a few times.

    of dense attention      products at the peak × its efficiency, exponentials, one launch
    of sparse attention     the same at its own efficiency, over the pairs of tiles that are kept and the means that a
                            tail adds; for every query block the loading of queries and the storing of the result;
                            one call; q, k, v and the output through memory, more often where tokens are permuted
    of choosing and layout  operators, bytes, products, sorting
    of idle units           all of attention × what the unit that has most to do has more than the average
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from pointillist.accel.plan import TAILS, Rule
from pointillist.hardware.profile import HardwareProfile
from pointillist.search.site_call import SiteShape, Way
from pointillist.search.work import (
    JOINING,
    Work,
    beside,
    dense_work,
    prepare_work,
    rule_work,
    site_work,
)

DENSE_ROWS = {"cpu": 256, "triton": 128}
"""Queries that dense attention gives to one unit at a time."""


LEARNT = 0.2
"""A density at which learning is counted: it costs the same at all."""


@dataclass(frozen=True)
class RuleCost:
    """Seconds that heads with the same rule add to a site's call: `per_head` each, `fixed` together."""

    per_head: float
    fixed: float


class CostModel:
    """What attention calls cost on one machine in one dtype."""

    def __init__(self, profile: HardwareProfile, dtype: torch.dtype = torch.float32) -> None:
        """Raises ValueError for a dtype whose matrix products the profile does not know."""
        self.profile = profile
        self._dtype = dtype
        self._backend = "cpu" if profile.kind == "cpu" else "triton"
        self._seconds = seconds_per(profile, dtype)

    def dense(self, shape: SiteShape) -> float:
        """Seconds of a dense call."""
        return self.seconds(dense_call(shape, self._dtype, self._backend, self.profile.units))

    def rule(
        self, rule: Rule, shape: SiteShape, *, tail: str = "none", residual: bool = False, block: int = 128,
        hoist: str = "", mixed: bool = True,
    ) -> RuleCost:  # fmt: skip
        """What heads with `rule` add to a call; `mixed`: beside heads with other rules.

        `shape.heads` does not count. What a call costs whatever its rules, and what idle units cost, is in `site` only.
        """
        way = self._way(tail, residual, block, hoist)
        found = rule_work(rule, shape.grid, shape.head_dim, way, beside(rule, None, shape, way) if mixed else None)
        return RuleCost(self.seconds(found.head * shape.batch), self.seconds(Work(operators=found.choosing + JOINING)))

    def prepare(self, rule: Rule, shape: SiteShape, *, block: int = 128) -> float:
        """Seconds that one head with `rule` adds to the last dense step, where some patterns learn."""
        way = self._way("none", False, block, "")
        return self.seconds(prepare_work(replace(rule, density=LEARNT), shape.grid, shape.head_dim, way) * shape.batch)

    def site(
        self, rules: Sequence[Rule], shape: SiteShape, *, tail: str = "none", residual: bool = False, block: int = 128,
        hoist: str = "",
    ) -> float:  # fmt: skip
        """Seconds of a site's sparse call; `rules` is one for all heads, or one for each. All dense is the dense call.

        Raises:
            ValueError: another number of rules.
        """
        if len(rules) not in (1, shape.heads):
            raise ValueError(f"there are {len(rules)} rules; a site of {shape.heads} heads has one, or one for each")
        if all(rule.kept == 1 for rule in rules):
            return self.dense(shape)
        way = self._way(tail, residual, block, hoist)
        return self.seconds(site_call(tuple(rules), shape, way, self.profile.units))

    def seconds(self, work: Work) -> float:
        """The time that `work` takes."""
        return sum(much * each for much, each in zip(work.values(), self._seconds.values(), strict=True))

    def _way(self, tail: str, residual: bool, block: int, hoist: str) -> Way:
        if tail not in TAILS:
            raise ValueError(f"tail is {tail!r}; allowed are {', '.join(TAILS)}")
        return Way(tail, residual, block, hoist, self._dtype, self._backend)


def seconds_per(profile: HardwareProfile, dtype: torch.dtype) -> Work:
    """Seconds for one of everything that `Work` counts.

    Raises:
        ValueError: the profile does not know the dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in profile.matmul_tflops:
        raise ValueError(f"the profile {profile.name} knows {', '.join(profile.matmul_tflops)}, not {name}")
    flop = 1e-12 / profile.matmul_tflops[name]
    return Work(
        operators=profile.launch_us * 1e-6,
        bytes=1e-9 / profile.memory_gbs,
        gathered=profile.gather_ps * 1e-12,
        flops=flop,
        sorted=profile.sort_ps * 1e-12,
        rows=profile.row_us * 1e-6 / profile.units,
        dense_flops=flop / profile.dense_efficiency,
        sparse_flops=flop / profile.sparse_efficiency,
        exps=1e-9 / profile.exp_gps,
        biased=profile.bias_ps * 1e-12,
    )


def dense_call(shape: SiteShape, dtype: torch.dtype, backend: str, units: int) -> Work:
    """The work of a dense call, as much of it as its slowest unit would make of all."""
    tasks = shape.batch * shape.heads * math.ceil(shape.tokens / DENSE_ROWS[backend])
    return _attention_times(dense_work(shape, dtype), math.ceil(tasks / units) * units / tasks)


@lru_cache(maxsize=2**16)
def site_call(rules: tuple[Rule, ...], shape: SiteShape, way: Way, units: int) -> Work:
    """The work of a sparse call, likewise."""
    heads = Counter(rules if len(rules) > 1 else rules * shape.heads)
    found = site_work(tuple(heads), shape, way)
    total = sum((found[rule].head * (count * shape.batch) for rule, count in heads.items()), Work())
    tasks = [task for rule in rules * (shape.heads // len(rules)) for task in _tasks(found[rule].head)]
    total = _attention_times(total, idle(tasks * shape.batch, units, longest_first=way.backend == "triton"))
    groups = sum(each.choosing for each in found.values()) + JOINING * max(0, len(found) - 2)
    return replace(total, operators=groups + max(each.laying for each in found.values()))


def _tasks(head: Work) -> list[float]:
    """The pairs of every query block of one head, which one unit takes at a time."""
    rows = round(head.rows)
    return [head.exps / max(1, rows)] * rows


def idle(tasks: Sequence[float], units: int, longest_first: bool) -> float:
    """What the unit that is done last has to do over the average: 1 if all have the same. Free units take the next."""
    if not sum(tasks):
        return 1.0
    loads = [0.0] * units
    for task in sorted(tasks, reverse=True) if longest_first else tasks:
        heapq.heapreplace(loads, loads[0] + task)
    return max(loads) * units / sum(tasks)


def _attention_times(work: Work, factor: float) -> Work:
    parallel = ("rows", "dense_flops", "sparse_flops", "exps", "biased")
    return replace(work, **{name: getattr(work, name) * factor for name in parallel})
