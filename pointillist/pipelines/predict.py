"""What a generation will take, before it runs: seconds, density, and the kind of every step.

Seconds are the sum of three kinds of work, each at its own pace: attention by pairs of tokens, everything else in the
transformer by tokens, decoding by pixels. Paces are those of the runs that were seen on this machine, of the same model
if there was one; before the first, they follow from how fast a matrix product is here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pointillist.pipelines.generate import GenerateRequest, plan_of
from pointillist.pipelines.outline import Outline, outline_of

SPARSE_PAIR, SPARSE_CALL = 1.5, 0.03
"""What a kept pair costs of a dense one, and what choosing costs of a dense call."""
REUSED = 0.05
"""What a reused step takes of the time beside attention."""
EFFICIENCY = {"attention": 0.35, "rest": 0.5}
"""Of a matrix product's speed, before anything was measured."""
DECODE = 6e4
"""Operations for each pixel of a frame, likewise."""
NEW = 0.5
"""The weight of a new run in the pace."""


@dataclass(frozen=True)
class Prediction:
    """Of one generation."""

    seconds: float
    """To the file, without loading the model."""
    dense_seconds: float
    """The same without a plan, a cache and regions."""
    density: float
    """Kept share of the pairs in sparse steps; 1 where there are none."""
    kinds: tuple[str, ...]
    """Of every step."""
    tokens: int
    plan: str
    source: str
    """Why this plan."""
    measured: bool
    """Whether a run of this model was seen here."""

    @property
    def computed(self) -> int:
        """Steps that are not reused."""
        return sum(kind != "cached" for kind in self.kinds)


@dataclass(frozen=True)
class _Work:
    """Of a run, in operations: those of attention, those beside it, and pixels that are decoded."""

    attention: float
    rest: float
    decode: float


class Predictor:
    """Predicts, and learns from what ran."""

    def __init__(self) -> None:
        self._paces: dict[tuple[str, str], float] = {}
        """Seconds for each operation or pixel, by model ("" is any) and kind of work."""
        self._speed: float | None = None

    def predict(self, request: GenerateRequest) -> Prediction:
        """Raises ValueError, PlanError, ModelError and AccelerateError as the generation would."""
        from pointillist.accel.choose_plan import choose_plan, with_caching, with_regions
        from pointillist.accel.conflicts import Setup, check_setup, targets_of
        from pointillist.accel.step_cache.policy import Caching
        from pointillist.pipelines.call import call_of

        outline = outline_of(request.model)
        asked = {"width": request.width, "height": request.height, "num_frames": request.frames,
                 "num_inference_steps": request.steps, "guidance_scale": request.guidance}  # fmt: skip
        call = call_of(outline, **asked)
        steps, wish = call["num_inference_steps"], plan_of(request, call["num_inference_steps"])
        targets = targets_of(outline, sparse=wish != "none")
        choice = choose_plan(wish, targets)
        choice = with_caching(with_regions(choice, request.regions, request.cache), request.cache, targets)
        check_setup(Setup(outline, targets, choice.plan, choice.caching, choice.table))

        grid = outline.grid(call["width"], call["height"], call["num_frames"])
        tokens, plan = math.prod(grid), choice.plan
        sparse = plan is not None and tokens >= plan.min_tokens
        density = _density(plan, tokens) if plan is not None and sparse else 1.0
        kinds = ("dense",) * steps
        if plan is not None:
            kinds = tuple(plan.schedule.kind(step, sigmas(outline, steps, request.shift)) for step in range(steps))
            kinds = kinds if sparse and density < 1 else tuple("dense" if k == "sparse" else k for k in kinds)
        if isinstance(choice.caching, Caching) and choice.caching.decider != "schedule":
            kinds = _eased(choice.caching, kinds)
        share = plan.regions.share if plan is not None and plan.regions is not None else 1.0
        pixels = call["width"] * call["height"] * call["num_frames"]
        branches = 2 if call["guidance_scale"] > 1 else 1
        work, dense = (
            _work(outline, tokens, branches, each, density, share, pixels) for each in (kinds, ("dense",) * steps)
        )
        return Prediction(
            self._seconds(request.model, work), self._seconds(request.model, dense), density, kinds, tokens,
            "none" if plan is None else plan.name, choice.source, (request.model, "rest") in self._paces,
        )  # fmt: skip

    def learn(self, facts: dict[str, Any]) -> None:
        """From the facts of a run. What is not one of `generate` teaches nothing."""
        try:
            outline, seconds, kinds = outline_of(facts["model"]), facts["seconds"], facts["kinds"]
            pixels = facts["width"] * facts["height"] * facts["frames"]
            branches = 2 if facts["guidance"] > 1 else 1
            density = 1.0 if facts["density"] is None else facts["density"]
            work = _work(outline, facts["tokens"], branches, tuple(kinds), density, 0.3, pixels)
            took = {
                "attention": seconds["attention"], "rest": seconds["denoise"] - seconds["attention"],
                "decode": seconds["total"] - seconds["denoise"],
            }  # fmt: skip
        except (KeyError, TypeError, ValueError):
            return
        for kind, spent in took.items():
            amount = getattr(work, kind)
            if amount > 0 and spent > 0:
                for model in (facts["model"], ""):
                    old = self._paces.get((model, kind), spent / amount)
                    self._paces[model, kind] = old + NEW * (spent / amount - old)

    def learn_all(self, runs: Iterable[dict[str, Any]]) -> None:
        """Of several runs, oldest first."""
        for facts in runs:
            self.learn(facts)

    def _seconds(self, model: str, work: _Work) -> float:
        return sum(getattr(work, kind) * self._pace(model, kind) for kind in ("attention", "rest", "decode"))

    def _pace(self, model: str, kind: str) -> float:
        for name in (model, ""):
            if (name, kind) in self._paces:
                return self._paces[name, kind]
        if self._speed is None:
            self._speed = _matrix_speed()
        return DECODE / (EFFICIENCY["rest"] * self._speed) if kind == "decode" else 1 / (
            EFFICIENCY[kind] * self._speed
        )  # fmt: skip


def sigmas(outline: Outline, steps: int, shift: float | None) -> tuple[float, ...]:
    """Of all steps, noisiest first, as the scheduler will set them."""
    from copy import deepcopy

    scheduler = deepcopy(outline.scheduler)
    if shift is not None:
        name = next((each for each in ("shift", "flow_shift") if each in scheduler.config), None)
        if name is not None:
            scheduler = type(scheduler).from_config(scheduler.config, **{name: shift})
    try:
        scheduler.set_timesteps(steps)
        return tuple(float(each) for each in scheduler.sigmas[:steps])
    except (TypeError, ValueError, AttributeError):  # it wants to know more, such as mu; a straight line is near enough
        return tuple(1 - step / steps for step in range(steps))


def _density(plan: Any, tokens: int) -> float:
    """Mean kept share over all heads."""
    shares = [rule.kept for row in plan.table for rule in plan.carried(row, tokens)]
    lengths = [len(row) for row in plan.table]
    if len(set(lengths)) == 1:
        return sum(shares) / len(shares)
    rows = [[rule.kept for rule in plan.carried(row, tokens)] for row in plan.table]
    return sum(sum(row) / len(row) for row in rows) / len(rows)


def _eased(caching: Any, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """As if every second step that may be reused were."""
    found, last = [], False
    for step, kind in enumerate(kinds):
        last = not last and caching.may_reuse(step, len(kinds), 0)
        found.append("cached" if last else kind)
    return tuple(found)


def _work(
    outline: Outline, tokens: int, branches: int, kinds: tuple[str, ...], density: float, share: float, pixels: int
) -> _Work:
    """Of a run with these steps."""
    config, transformer = outline.transformer.config, outline.transformer
    layers = getattr(config, "num_layers", 1)
    width = config.num_attention_heads * config.attention_head_dim
    call = 4.0 * tokens**2 * width * layers * branches
    weights = sum(parameter.numel() for parameter in transformer.parameters() if parameter.ndim >= 2)
    rest = 2.0 * weights * tokens * branches
    of_attention = {"dense": 1.0, "sparse": min(1.0, SPARSE_PAIR * density + SPARSE_CALL), "region": share}
    of_rest = {"cached": REUSED, "region": share}
    return _Work(
        call * sum(of_attention.get(kind, 0.0) for kind in kinds), rest * sum(of_rest.get(kind, 1.0) for kind in kinds),
        float(pixels),
    )  # fmt: skip


def _matrix_speed() -> float:
    """Operations a second of a matrix product on the device that would be used."""
    import torch

    cuda = torch.cuda.is_available()
    device, size = torch.device("cuda" if cuda else "cpu"), 8192 if cuda else 768
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        product = matrix @ matrix
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
        del product
    return 2.0 * size**3 / best
