"""What the search may choose for a head: patterns, a few of their options, and densities."""

from pointillist.accel.patterns import PATTERNS
from pointillist.accel.plan import Rule

DENSITIES = (0.06, 0.15, 0.25, 0.4)
TAILS = ("pooled",)
"""Tails that all heads of a plan share; each is searched by itself. Without one the error was higher than with block
means at the next lower density in 95 of the 120 cases of docs/patterns.md, and in 113 that was not slower."""
DENSE = Rule("dense", 1.0)
OPTIONS: dict[str, tuple[dict[str, str | int | float | bool], ...]] = {
    "pooled": ({}, {"order": "tiles"}),
    "masses": ({"rows": 16}, {"rows": 16, "order": "tiles"}),
    "semantic": ({"routing": "error"},),
    "diagonal": ({}, {"order": "hwt"}),
    "stripe": ({"by": "anchor"},),
}
"""Where a pattern's defaults are not all that is worth a try."""
NO_CANDIDATES = ("dense", "skip", "random", "sla", "vsa", "seer")
"""Those without a density, the control, and those that need trained weights."""


def candidates(densities: tuple[float, ...] = DENSITIES) -> tuple[Rule, ...]:
    """All rules; the first is dense."""
    skips = (Rule("skip", 1.0), Rule("skip", 1.0, (("reuse", True),)))
    sparse = (
        Rule(name, density, tuple(sorted(options.items())))
        for name in PATTERNS
        if name not in NO_CANDIDATES
        for options in OPTIONS.get(name, ({},))
        for density in densities
    )
    return (DENSE, *skips, *sparse)
