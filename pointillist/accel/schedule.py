"""Which steps are dense."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The first steps decide the layout of the picture and are dense; the others follow the patterns."""

    dense_steps: int = 0
    """At least so many first steps are dense, whatever their sigmas."""
    dense_above: float = 1.0
    """Steps whose sigma exceeds this share of the first one's are dense: it carries to any step count."""
    dense_every: int = 0
    """Of the steps after those, every n-th is dense (Re-ttention's refresh); 0 is none."""

    def kind(self, step: int | None, sigmas: tuple[float, ...]) -> str:
        """`dense` or `sparse`. A schedule without dense steps needs no `step`; else an unknown step is dense.

        Args:
            step: index into `sigmas`, None outside of a generation.
            sigmas: of all steps, descending from the noisiest; the scheduler's own units.
        """
        if self.dense_steps == 0 and self.dense_above >= 1 and not self.dense_every:
            return "sparse"
        if step is None or step < self.dense_steps:
            return "dense"
        if sigmas[step] > self.dense_above * sigmas[0]:
            return "dense"
        since = step - self._first_sparse(sigmas)
        return "dense" if self.dense_every and (since + 1) % self.dense_every == 0 else "sparse"

    def _first_sparse(self, sigmas: tuple[float, ...]) -> int:
        above = sum(sigma > self.dense_above * sigmas[0] for sigma in sigmas)
        return max(self.dense_steps, above)
