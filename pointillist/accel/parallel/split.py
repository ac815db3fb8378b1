"""One transformer's part in a job of several processes: where it is split, what is asked of the others, and when."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from pointillist.accel.parallel import engine
from pointillist.accel.parallel.agreement import Agreement, checksum
from pointillist.accel.parallel.balance import balance_of, head_counts
from pointillist.accel.parallel.engine import config_of, degrees
from pointillist.accel.parallel.seam import Seam
from pointillist.accel.parallel.share import Share
from pointillist.accel.patterns import pattern_class
from pointillist.accel.patterns.pattern import Pattern
from pointillist.accel.plan import Plan

__all__ = ["Split", "agreement_of", "config_of", "degrees", "why_no_ring"]


class Split:
    """Of one transformer, over the processes of its `ContextParallelConfig`."""

    def __init__(self, transformer: Any, config: Any, heads: int, runtime: Any) -> None:
        """Raises ValueError for a model or a number of heads that cannot be split so."""
        self.seam = Seam(transformer, config)
        head_counts(heads, engine.degrees(config)[0])
        self._transformer, self._heads, self._runtime = transformer, heads, runtime
        self._greeted: set[tuple[str, str]] = set()

    def install(self) -> Callable[[], None]:
        """Returns the undo."""
        give_back, unhook = engine.take_over(self._transformer), self.seam.install()

        def undo() -> None:
            unhook()
            give_back()

        return undo

    def share(self, site: Any, layer: int) -> Share:
        """What handles the attention calls of `site`."""
        plan = self._runtime.plan
        return Share(site, self.seam, self._heads, layer, balanced=plan is None or plan.reuse_layers == 1)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the transformer begins. Raises ParallelError unless all processes make the same one.

        In the first step that includes all that goes in: noise, prompts, sizes. Later only what they are about to do.
        """
        state, plan = self._runtime.state, self._runtime.plan
        facts = {
            "plan": "none" if plan is None else f"{plan.name} {hash_of(plan)}",
            "number of steps": len(state.sigmas),
            "step": state.step,
            "guidance branch": state.branch,
            "transformer": state.expert,
            "token grid": state.grid,
        }
        if state.step in (0, None) or (state.expert, state.branch) not in self._greeted:
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            facts |= {f"input {name}": checksum([value]) for name, value in given.items() if torch.is_tensor(value)}
            self._greeted.add((state.expert, state.branch))
        self._runtime.agreement.check(facts)

    def leave(self) -> None:
        """It has ended, well or not."""
        self.seam.leave()

    def begin_generation(self) -> None:
        """Say again what goes in."""
        self._greeted.clear()

    def end_generation(self) -> None:
        """The densities of the record are those of this process's heads: make them those of all heads. And how evenly
        heads were spread."""
        layers, state = len(self.seam.blocks), self._runtime.state
        if (ulysses := engine.degrees(self.seam.config)[0]) > 1:
            found = balance_of(self._runtime.plan, layers, self._heads, ulysses, state.expert, state.sigmas)
            self._runtime.record.balance = (found.before, found.after)
        record, counts = self._runtime.record, head_counts(self._heads, engine.degrees(self.seam.config)[0])
        ring = engine.degrees(self.seam.config)[1]
        record.heads = self._heads
        of_sites = [call.density for call in record.calls if call.density is not None]
        mine = [float(density) for density in of_sites]
        all_said = self._runtime.agreement.lists_of(mine)
        total = [
            sum(each * heads for each, heads in zip(said, counts * ring, strict=True)) / (self._heads * ring)
            for said in zip(*all_said, strict=True)
        ]
        means = iter(total)
        record.calls[:] = [
            call if call.density is None else call._replace(density=torch.tensor(next(means))) for call in record.calls
        ]


def hash_of(plan: Plan) -> str:
    """Names what the plan says."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()[:12]


def agreement_of(config: Any) -> Agreement:
    """Between the processes of a config."""
    return Agreement(config)


def why_no_ring(plan: Plan | None) -> str:
    """Why the plan cannot be carried out in a ring; "" if it can."""
    if plan is None:
        return ""
    looking = sorted(name for name in plan.patterns if not pattern_class(name).STATIC)
    if looking:
        return (
            f"patterns that look at queries and keys ({', '.join(looking)}) need all of them, and a process of a ring "
            "has only its own queries; take ulysses alone, or a plan of patterns that look at the grid "
            "(tile, window, radial, neighborhood, diagonal, …)"
        )
    if any(pattern_class(name).finish is not Pattern.finish for name in plan.patterns):
        return "the pattern skip has the last word on its rows, which parts of a ring do not know; take ulysses alone"
    if plan.tail not in ("none", "pooled"):
        return f"the tail {plan.tail!r} is of whole rows of the attention matrix; take the tail none or pooled"
    if plan.quantized != "none":
        return f"quantized={plan.quantized!r} has no log-sum-exp to merge parts by; take quantized='none'"
    if plan.regions is not None:
        return "regions keep the keys of all tokens, which no process of a ring has; take regions='none'"
    return ""
