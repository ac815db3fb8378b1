"""`Study`: what a search measures. Equal studies give equal files, so that work can be resumed, shared and joined."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from pointillist.accel.plan import Rule

VERSION = 5
"""Raised when files of an earlier version no longer mean the same."""


@dataclass(frozen=True)
class Study:
    """A pipeline's call, the prompts to calibrate on, and what may be chosen."""

    model: str
    """Fingerprint of the transformer."""
    layers: int
    heads: int
    head_dim: int
    prompts: tuple[str, ...]
    call: dict[str, Any] = field(hash=False)
    """Arguments of the pipeline beside the prompt: size, frames, steps, guidance."""
    rules: tuple[Rule, ...]
    tails: tuple[str, ...]
    steps: int
    dense_steps: int
    """So many first steps are dense; the last of them is what patterns calibrate on."""
    buckets: int = 3
    """Into so many runs of steps the others are divided."""
    block: int = 128
    query_blocks: int = 4
    """Of each call so many blocks of queries are looked at."""
    seed: int = 0
    dtype: str = "float32"

    @property
    def edges(self) -> tuple[int, ...]:
        """The first step of each bucket, and the number of steps."""
        count = min(self.buckets, self.steps - self.dense_steps)
        sparse = self.steps - self.dense_steps
        return tuple(self.dense_steps + round(sparse * i / count) for i in range(count + 1))

    @property
    def bucket_steps(self) -> tuple[int, ...]:
        """The step in the middle of each bucket, at which candidates are tried."""
        return tuple((first + stop - 1) // 2 for first, stop in pairwise(self.edges))

    @property
    def guidance_shares(self) -> tuple[float, float]:
        """Of the branch with the prompt and of the other, in the guided output."""
        scale = float(self.call.get("guidance_scale", 1.0))
        return scale, 1 - scale

    @property
    def calibration_step(self) -> int:
        """The last dense step."""
        return self.dense_steps - 1

    def digest(self, *part: Any) -> str:
        """Names the results of a part of the study by everything that they depend on."""
        values = {**asdict(self), "rules": [rule.to_dict() for rule in self.rules], "version": VERSION}
        return hashlib.sha256(json.dumps([values, part], sort_keys=True, default=str).encode()).hexdigest()[:16]
