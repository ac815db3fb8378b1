"""What a cached step uses in place of a computed residual, from those of the last computed steps.

    last         the last one, unchanged
    taylor       a straight line through the last two (TaylorSeer of first order; Adams–Bashforth for a sampler)
    parabola     a parabola through the last three
    exponential  dynamic mode decomposition of the last four to six: decaying and swinging modes (cache-dit's DMD)

Positions are sigmas, which fall evenly in time for the model: with a shifted schedule step numbers do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


History = Sequence[tuple[float, "torch.Tensor"]]
"""Positions and residuals of computed steps, the oldest first."""


def last(history: History, position: float) -> torch.Tensor:
    """The newest residual."""
    return history[-1][1]


def polynomial(points: int) -> Callable[[History, float], torch.Tensor]:
    """The polynomial through the last so many points (Lagrange), or as many as there are."""

    def predict(history: History, position: float) -> torch.Tensor:
        mine = history[-points:]
        total: torch.Tensor | None = None
        for i, (at, residual) in enumerate(mine):
            weight = 1.0
            for j, (other, _) in enumerate(mine):
                if i != j:
                    weight *= (position - other) / (at - other)
            total = residual * weight if total is None else total.add(residual, alpha=weight)
        assert total is not None
        return total

    return predict


def exponential(history: History, position: float) -> torch.Tensor:
    """Modes of the last residuals, if at least four are evenly spaced; else a straight line.

    Economy SVD of the snapshots, the reduced propagator by least squares, its eigenvalues raised to how far `position`
    lies beyond the last snapshot. What is not finite falls back to the last residual.
    """
    import torch

    tail = _evenly_spaced(history)
    if len(tail) < 4:
        return polynomial(2)(history, position)
    spacing = tail[-1][0] - tail[-2][0]
    snapshots = torch.stack([residual.flatten() for _, residual in tail], 1).double()  # [n, m]
    before, after = snapshots[:, :-1], snapshots[:, 1:]
    u, s, vh = torch.linalg.svd(before, full_matrices=False)
    rank = int((s > 1e-4 * s[0]).sum())
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    propagator = (u.mT @ after @ vh.mT) / s  # [rank, rank]
    values, vectors = torch.linalg.eig(propagator)
    start = torch.linalg.lstsq(vectors, (u.mT @ snapshots[:, -1:]).to(vectors.dtype)).solution[:, 0]
    steps = (position - tail[-1][0]) / spacing
    found = (u.to(vectors.dtype) @ (vectors @ (values**steps * start))).real
    newest = tail[-1][1]
    return found.to(newest.dtype).view_as(newest) if bool(found.isfinite().all()) else newest


def _evenly_spaced(history: History) -> History:
    """The longest end of it whose positions are evenly spaced within a fifth."""
    count = min(2, len(history))
    while count < len(history):
        older, middle = history[-count - 1][0], history[-count][0]
        spacing = history[-1][0] - history[-2][0]
        if abs((middle - older) - spacing) > 0.2 * abs(spacing):
            break
        count += 1
    return history[-count:]


PREDICTORS: dict[str, tuple[int, Callable[[History, float], torch.Tensor]]] = {
    "last": (1, last),
    "taylor": (2, polynomial(2)),
    "parabola": (3, polynomial(3)),
    "exponential": (6, exponential),
}
"""By name: how many residuals are kept, and the function."""
