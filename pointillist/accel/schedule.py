"""What each step of a generation does: dense, sparse, cached or region."""

from dataclasses import dataclass
from functools import lru_cache

KINDS = ("dense", "sparse", "cached", "region")


@dataclass(frozen=True)
class Schedule:
    """The first steps decide the layout of the picture and are dense; the others follow the patterns.

    Sigmas are given as shares of the first one's, so that a schedule carries to any step count.
    """

    dense_steps: int = 0
    """At least so many first steps are dense, whatever their sigmas."""
    dense_above: float = 1.0
    """Steps whose sigma exceeds this share of the first one's are dense."""
    dense_every: int = 0
    """Of the computed steps after those, every n-th is dense (Re-ttention's refresh); 0 is none."""
    computed: tuple[float, ...] = ()
    """The transformer is computed at the steps next to these sigmas, at others what it gave is reused; none named: it
    is computed at every step. More steps are then as many computed ones, and as good."""
    region_after: tuple[float, ...] = ()
    """Behind the steps next to these of the `computed` sigmas, a part of the tokens is updated up to the next computed
    one; behind others what they gave is reused."""
    region_from: float = 0.0
    """Computed steps after the dense ones whose sigma is at most this share of the first one's update a part of the
    tokens; 0 is none."""
    region_to: float = 0.0
    """But at least this share."""
    region_every: int = 4
    """Of those, the first and every n-th after it compute all tokens nevertheless."""

    def kind(self, step: int | None, sigmas: tuple[float, ...]) -> str:
        """One of `KINDS`. A schedule without dense steps needs no `step`; else an unknown step is dense.

        Args:
            step: index into `sigmas`, None outside of a generation.
            sigmas: of all steps, descending from the noisiest; the scheduler's own units.
        """
        if step is None:
            plain = self.dense_steps == 0 and self.dense_above >= 1 and not self.dense_every
            return "sparse" if plain else "dense"
        return kinds(self, sigmas)[step]


@lru_cache(maxsize=256)
def kinds(schedule: Schedule, sigmas: tuple[float, ...]) -> tuple[str, ...]:
    """The kinds of all steps."""
    computed, region_after = (_next_to(points, sigmas) for points in (schedule.computed, schedule.region_after))
    if computed:
        computed |= {0}
    last = 0  # computed step
    after, in_region = 0, 0  # computed steps after the first dense ones; those of them in the range of regions
    found = []
    for step, sigma in enumerate(sigmas):
        share = sigma / sigmas[0]
        if computed and step not in computed:
            found.append("region" if last in region_after else "cached")
            continue
        last = step
        if step < schedule.dense_steps or share > schedule.dense_above:
            found.append("dense")
        else:
            after += 1
            kind = "dense" if schedule.dense_every and after % schedule.dense_every == 0 else "sparse"
            if schedule.region_to <= share <= schedule.region_from:
                kind = "region" if in_region % schedule.region_every else kind
                in_region += 1
            found.append(kind)
    return tuple(found)


def _next_to(points: tuple[float, ...], sigmas: tuple[float, ...]) -> frozenset[int]:
    """The steps whose shares of the first sigma are nearest to some points."""
    shares = [sigma / sigmas[0] for sigma in sigmas]
    return frozenset(min(range(len(shares)), key=lambda step: abs(shares[step] - point)) for point in points)
