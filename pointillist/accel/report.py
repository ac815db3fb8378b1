"""What an accelerated pipeline really did."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """The latest generation, in numbers. Times in seconds; densities are shares of the video × video pairs."""

    plan: str
    plan_source: str
    backend: str
    backend_reason: str
    tokens: int
    density: float | None
    """Mean over the sparse calls; None if there was none."""
    density_overall: float | None
    """Mean over all computed calls."""
    density_per_site: dict[str, float]
    steps: dict[str, int]
    """Steps of each kind: dense, sparse, cached, region."""
    attention_seconds: float
    denoise_seconds: float | None
    fallbacks: tuple[str, ...]

    def __str__(self) -> str:
        def number(value: Any) -> str:
            return "–" if value is None else f"{value:.3f}"

        rows = [
            ("plan", f"{self.plan} ({self.plan_source})"),
            ("backend", f"{self.backend} ({self.backend_reason})"),
            ("tokens", str(self.tokens)),
            ("density", f"{number(self.density)} in sparse calls, {number(self.density_overall)} over all"),
            ("steps", ", ".join(f"{count} {kind}" for kind, count in self.steps.items() if count) or "none yet"),
            ("attention", f"{self.attention_seconds:.2f} s"),
            ("denoising", f"{number(self.denoise_seconds)} s"),
            *(("fallback", reason) for reason in self.fallbacks),
        ]
        return "\n".join(f"{name:<10} {value}" for name, value in rows)


def make_report(runtime: Any, plan: str, plan_source: str, backend: str, backend_reason: str) -> Report:
    """Summarise the record of `runtime`'s latest generation."""
    record, run = runtime.current_record(), runtime.run
    densities, by_site, sparse_steps = [], defaultdict(list), set()
    for site, _, step, density in record.calls:
        densities.append(density)
        by_site[site].append(density)
        if density < 1:
            sparse_steps.add(step)
    sparse = [d for d in densities if d < 1]
    steps = {step for _, _, step, _ in record.calls}
    return Report(
        plan=plan,
        plan_source=plan_source,
        backend=backend,
        backend_reason=backend_reason,
        tokens=record.tokens,
        density=_mean(sparse),
        density_overall=_mean(densities),
        density_per_site={site: sum(values) / len(values) for site, values in by_site.items()},
        steps={"dense": len(steps - sparse_steps), "sparse": len(sparse_steps), "cached": 0, "region": 0},
        attention_seconds=record.attention_seconds(),
        denoise_seconds=run.finished - run.started if run.started and run.finished else None,
        fallbacks=tuple(runtime.fallbacks),
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
