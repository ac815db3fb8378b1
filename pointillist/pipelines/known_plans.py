"""The plans that a model could follow, and why others cannot be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pointillist.pipelines.outline import Outline


@dataclass(frozen=True)
class KnownPlan:
    """A plan file."""

    name: str
    """Of the file, without its ending."""
    path: Path
    words: str
    """What it promises, or why it does not fit."""
    fits: bool


def known_plans(outline: Outline, files: Iterable[Path]) -> list[KnownPlan]:
    """The shipped plans and those in `files`, the fitting ones first."""
    from pointillist.accel.choose_plan import shipped_files

    found = [_known(outline, path) for path in [*shipped_files(), *files]]
    return sorted(found, key=lambda plan: not plan.fits)


def _known(outline: Outline, path: Path) -> KnownPlan:
    from pointillist.accel.conflicts import AccelerateError, targets_of
    from pointillist.accel.plan import Plan, PlanError

    try:
        plan = Plan.load(path)
        target = targets_of(outline)[0]
        family, transformer = target.family, target.transformer
        plan.check_fits(family.fingerprint(transformer), len(family.sites(transformer)), family.heads(transformer))
    except (PlanError, AccelerateError) as error:
        return KnownPlan(path.stem, path, str(error), fits=False)
    figures = plan.measured or plan.predicted
    said = [f"{figures['speedup']:.1f}×"] if "speedup" in figures else []
    said += [f"{figures['psnr']:.0f} dB"] if "psnr" in figures else []
    return KnownPlan(path.stem, path, ", ".join(said), fits=True)
