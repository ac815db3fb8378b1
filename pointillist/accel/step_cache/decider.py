"""What every decider is: compute this step's transformer call, or reuse what earlier calls gave."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    import torch

    from pointillist.accel.step_cache.calibration import MadeWith


@dataclass
class Seen:
    """What a decider sees of one transformer call."""

    step: int
    steps: int
    x: torch.Tensor
    """The latents that go in, [B, …]."""
    memory: dict[Any, Any] = field(default_factory=dict)
    """The decider's own, in this branch and generation; empty again when shapes or experts change."""
    front: torch.Tensor | None = None
    """What the first `front` blocks added to the hidden states, once they have run."""
    modulation: torch.Tensor | None = None
    """The timestep's projection that modulates every block, where the family tells it."""
    branch: str = ""
    model: str = ""
    """Fingerprint of the transformer."""


@dataclass(frozen=True)
class Decider:
    """Frozen parameters; its state lies in `Seen.memory`. A new one subclasses this and is listed in `DECIDERS`."""

    NAME: ClassVar[str]
    SHARED: ClassVar[bool] = True
    """The first guidance branch of a step decides for all: a fresh output of one and an old one of the other would be
    magnified by the guidance scale."""
    ADAPTIVE: ClassVar[bool] = True
    """Whether the decision depends on what is computed."""

    threshold: float = 0.1
    """Reuse while the error that is expected stays below it: 0 never reuses."""

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, int | float) or not 0 <= self.threshold < 1e6:
            raise ValueError(f"threshold is {self.threshold!r}; it must be a number, 0 or more")

    @property
    def blocks_before(self) -> int:
        """So many blocks run before it decides; 0 where it decides on entering."""
        return 0

    @property
    def calibrated(self) -> MadeWith | None:
        """What its curves were recorded with; None where it has none."""
        return None

    def reuse(self, seen: Seen) -> bool:
        """Whether to reuse; asked at every step, also where the answer cannot be followed."""
        raise NotImplementedError

    def computed(self, seen: Seen, out: torch.Tensor) -> None:
        """A call was computed, and gave `out`."""

    def bytes_kept(self, seen: Seen, out: torch.Tensor, branches: int) -> int:
        """What it remembers of so many guidance branches, beside the residuals."""
        return 0

    @classmethod
    def make(cls, **options: Any) -> Self:
        """Raises ValueError for options that it does not have, or values they cannot have."""
        known = [each.name for each in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"{cls.NAME} has no option {', '.join(unknown)}; it has {', '.join(known)}, and as all deciders first, "
                "last, most, predictor and level"
            )
        return cls(**options)


def relative_change(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """0-d: mean|new − old| / mean|old|, of the batch entry where it is greatest: one that needs a step gets it."""
    difference = (new.float() - old.float()).abs().flatten(1).mean(1)
    return (difference / old.float().abs().flatten(1).mean(1)).max()
