"""Meeting a wish: choose by prediction, run, correct the predictions by what was measured, choose again."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pointillist.search.assign import OverBudget
from pointillist.search.curve import Choice, Choices
from pointillist.search.errors import SearchError
from pointillist.search.verify import Measured

SPEEDUPS = {"quality": 1.8, "balanced": 2.7, "fast": 3.3}
"""How much faster denoising is under the plans of these names, where steps may be reused."""
ATTENTION_SPEEDUPS = {"quality": 1.5, "balanced": 2.0, "fast": 3.0}
"""How much faster attention is under them, where every step is computed."""
RUNS = 3
"""So many plans are run at most before the final one."""
SPEED_TOLERANCE = 0.03
"""A measured speed-up this near below the wished one is as wished."""
PSNR_TOLERANCE = 1.0
"""A plan that is so much better than wished (dB) could be faster: another is tried."""


@dataclass(frozen=True)
class Wish:
    """What the plan should reach: `speedup`, `psnr`, or else what its name says.

    Raises:
        ValueError: both of the two, or a value that makes no sense.
    """

    speedup: float | None = None
    """Of denoising, on the machine that it is searched for."""
    psnr: float | None = None
    """At least so many dB against the dense clip, as the median over the prompts that are run."""
    speed: str = "balanced"
    """A name in `ATTENTION_SPEEDUPS`."""

    def __post_init__(self) -> None:
        if self.speedup is not None and self.psnr is not None:
            raise ValueError("a target speed-up and a least PSNR exclude each other; give one of them")
        if self.speedup is not None and not 1 <= self.speedup <= 1000:
            raise ValueError(f"the target speed-up is {self.speedup}; it must be a number from 1 to 1000")
        if self.psnr is not None and not 0 < self.psnr <= 100:
            raise ValueError(f"the least PSNR is {self.psnr} dB; it must be above 0 and at most 100")
        if self.speed not in ATTENTION_SPEEDUPS:
            raise ValueError(f"the speed is {self.speed!r}; allowed are {', '.join(ATTENTION_SPEEDUPS)}")

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g} times as fast"
        return f"at least {self.psnr:g} dB" if self.psnr is not None else self.speed


@dataclass(frozen=True)
class Try:
    """A choice, and what it was when it was run."""

    choice: Choice
    measured: Measured


Run = Callable[[Choice], Measured]


def meet(wish: Wish, choices: Choices, run: Run | None, timed: bool) -> tuple[Choice, list[Try]]:
    """The choice that does what is wished, and everything that was run.

    Args:
        run: runs a choice; None means that predictions must do.
        timed: times that are measured count: the plan is for this machine.

    Raises:
        SearchError: no plan can do it; says what can be had.
    """
    if wish.speedup is None and wish.psnr is None:
        named = _named(choices, wish.speed)
        tries = [Try(each, run(each)) for each in named.values()] if run is not None else []
        return named[wish.speed], tries
    tries = []
    choice = _choose(wish, choices, tries, timed)
    while run is not None and len(tries) <= RUNS:
        tries.append(Try(choice, run(choice)))
        good = [each for each in tries if _holds(wish, each, timed)]
        if good and (wish.psnr is None or len(tries) > RUNS or good[-1].measured.psnr < wish.psnr + PSNR_TOLERANCE):
            break
        choice = _choose(wish, choices, tries, timed)
        if any(choice.same_as(each.choice) for each in tries):
            break
    if run is None:
        return choice, tries
    good = [each for each in tries if _holds(wish, each, timed)]
    if not good:
        raise SearchError(f"no plan that was run is {wish}: {_had(tries, timed)}; wish for less")
    return max(
        good, key=lambda each: each.choice.speedup if wish.psnr is not None else each.measured.psnr
    ).choice, tries


def _named(choices: Choices, wished: str) -> dict[str, Choice]:
    """The choice of every named speed that can be had. Raises SearchError if the wished one cannot."""
    speedups, choose = (SPEEDUPS, _at_speedup) if choices.reuses else (ATTENTION_SPEEDUPS, _at_attention)
    found = {}
    for name, speedup in speedups.items():
        try:
            found[name] = choose(choices, speedup)
        except SearchError:
            if name == wished:
                raise
    return found


def correction(tries: list[Try]) -> float:
    """dB by which clips are better than predicted, the median of what was run."""
    return float(np.median([each.measured.psnr - each.choice.psnr for each in tries])) if tries else 0.0


def _choose(wish: Wish, choices: Choices, tries: list[Try], timed: bool) -> Choice:
    if wish.speedup is not None:
        ratios = [each.measured.speedup / each.choice.speedup for each in tries] if timed else []
        return _at_speedup(choices, wish.speedup / (float(np.median(ratios)) if ratios else 1.0))
    assert wish.psnr is not None
    wanted = wish.psnr - correction(tries)
    slow, fast = 1.0, choices.fastest() * (1 - 1e-6)
    for _ in range(20):
        middle = (slow + fast) / 2
        slow, fast = (middle, fast) if _at_speedup(choices, middle).psnr >= wanted else (slow, middle)
    return _at_speedup(choices, slow)


def _holds(wish: Wish, one: Try, timed: bool) -> bool:
    if wish.psnr is not None:
        return one.measured.psnr >= wish.psnr
    assert wish.speedup is not None
    return not timed or one.measured.speedup >= wish.speedup * (1 - SPEED_TOLERANCE)


def _at_speedup(choices: Choices, speedup: float) -> Choice:
    try:
        return choices.at_speedup(speedup)
    except OverBudget as error:
        raise SearchError(
            f"no plan makes denoising {speedup:.2f} times as fast: {choices.fastest():.2f} times is the most that is "
            "predicted with every head skipped; wish for less"
        ) from error


def _at_attention(choices: Choices, speedup: float) -> Choice:
    try:
        return choices.at_attention(choices.dense.attention / speedup)
    except OverBudget as error:
        raise SearchError(
            f"no plan makes attention {speedup:g} times as fast on this machine at this length; sparse attention does "
            f"not pay here: {choices.dense.attention / error.least:.2f} times is the most that is predicted"
        ) from error


def _had(tries: list[Try], timed: bool) -> str:
    return ", ".join(
        f"{each.measured.psnr:.1f} dB at {each.measured.speedup if timed else each.choice.speedup:.2f}×"
        for each in tries
    )
