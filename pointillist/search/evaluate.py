"""How wrong every candidate makes every head of one attention call, on a few of its queries.

No matrix of scores is ever kept. For each layer a search remembers, for every candidate, what the calibration step and
the last one lost at the R sampled queries in both branches, and what the first branch of a step has too much:
14·H·R·D bytes.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pointillist.accel.blocks import Blocks
from pointillist.accel.layouts import Group, Laid, lay_out, pattern_for, select, sub_call
from pointillist.accel.patterns.pattern import Call, Selection
from pointillist.accel.plan import Rule
from pointillist.accel.tails import attend_blocks

KINDS = ("plain", "since calibration", "since the bucket before")
"""Of errors: without a residual, with that of the calibration step, with that of the last step that was looked at."""


@dataclass
class Remembered:
    """What one candidate knows at one site and branch from earlier steps."""

    memory: dict[Any, Any] = field(default_factory=dict)
    """Of its pattern, from the calibration step."""
    calibrated: dict[str, "Lost"] = field(default_factory=dict)
    """By tail: from the calibration step."""
    recent: dict[str, "Lost"] = field(default_factory=dict)
    """By tail: from the last step that was looked at."""
    other: dict[str, torch.Tensor] = field(default_factory=dict)
    """By tail: what the step's first guidance branch has too much, of each kind, times its share in the guided output;
    half precision [kinds, B, H, R, D]."""


@dataclass(frozen=True)
class Lost:
    """The dense output less a candidate's, at the sampled queries of a step: half precision [B, H, R, D]."""

    step: int
    output: torch.Tensor


@dataclass(frozen=True)
class Errors:
    """Squared relative errors of one call, float64 [candidates, tails, kinds, H]: of a head's output behind the output
    projection, over that of all heads together, so that heads can be compared and added.

    With guidance it is the error of the guided output, g·cond + (1 − g)·uncond: what both branches have too much alike
    counts once, where errors of their own are amplified by g and g − 1."""

    values: torch.Tensor
    kept: torch.Tensor | None
    """uint8 [candidates, H, cells, cells] if asked for: the share of pairs that each keeps between runs of tokens, of
    255."""


def evaluate(
    call: Call,
    out: torch.Tensor,
    weight: torch.Tensor,
    rules: tuple[Rule, ...],
    tails: tuple[str, ...],
    known: dict[Rule, Remembered],
    query_blocks: int,
    calibrate: bool,
    share: float = 1.0,
    first: dict[Rule, Remembered] | None = None,
    cells: int = 0,
) -> Errors:
    """Try every candidate on a call of all heads whose dense output is `out` [B, H, S, D].

    Args:
        weight: [C, H·D], the output projection.
        known: what each candidate remembers, to be filled at the calibration step and read later.
        calibrate: this is the calibration step.
        share: of this branch in the guided output.
        first: what candidates remember in the branch before it, whose errors are added; None if this is the first.
        cells: rows and columns of the map of what is kept; 0 is no map.
    """
    heads, dim = out.shape[1], out.shape[3]
    projections = weight.float().unflatten(1, (heads, dim)).permute(1, 2, 0)  # [H, D, C]
    grams = projections @ projections.mT
    values = torch.zeros(len(rules), len(tails), len(KINDS), heads, dtype=torch.float64)
    kept = torch.zeros(len(rules), heads, cells, cells, dtype=torch.uint8)
    for index, rule in enumerate(rules):
        if rule.pattern == "dense":
            kept[index] = 255
            continue
        remembered = known.setdefault(rule, Remembered())
        tries = _try(call, out, rule, tails, remembered, query_blocks, calibrate)
        if cells and tries.laid is not None:
            kept[index] = (kept_map(tries.laid.parts[0][1], cells) * 255).round().to(torch.uint8).cpu()
        true = (out[:, :, tries.tokens].float() @ projections).sum(1).square().sum() / len(tries.tokens)
        for tail, difference in zip(tails, tries.differences, strict=True):
            each = share * _of_kinds(
                difference, rule, call, remembered.calibrated.get(tail), remembered.recent.get(tail)
            )
            remembered.recent[tail] = Lost(call.step, -difference.half())
            if calibrate:
                remembered.calibrated[tail] = remembered.recent[tail]
            if first is not None:
                each = each + first[rule].other.pop(tail).float()
            elif not calibrate:
                remembered.other[tail] = each.half()
            values[index, tails.index(tail)] = torch.stack([_squared(kind, grams, true) for kind in each])
    return Errors(values, kept if cells else None)


def _of_kinds(
    difference: torch.Tensor, rule: Rule, call: Call, calibrated: Lost | None, recent: Lost | None
) -> torch.Tensor:
    """What a candidate has too much when nothing is added, and when what was lost at either step is: [kinds, …].

    A head that is skipped has no residual; one that is reused is one that is skipped, with all that this loses.
    """
    reused = rule.pattern == "skip" and bool(dict(rule.options).get("reuse"))

    def with_lost(lost: Lost | None) -> torch.Tensor:
        if lost is None or (rule.pattern == "skip" and not reused):
            return difference
        left = 1.0 if reused else (call.steps - call.step) / (call.steps - lost.step)  # as in `tails.py`
        return difference + left * lost.output.float()

    return torch.stack([with_lost(calibrated) if reused else difference, with_lost(calibrated), with_lost(recent)])


def _squared(difference: torch.Tensor, grams: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """[H]: squared norms behind the projection for each query, over the site's. difference is [B, H, R, D]."""
    return (((difference @ grams) * difference).sum((0, 2, 3)) / difference.shape[2] / true).double()


@dataclass(frozen=True)
class _Tries:
    """A candidate on one call: the sampled tokens [R], and for each tail what its output has too much there."""

    tokens: torch.Tensor
    differences: tuple[torch.Tensor, ...]
    laid: Laid | None = None


def _try(
    call: Call,
    out: torch.Tensor,
    rule: Rule,
    tails: tuple[str, ...],
    remembered: Remembered,
    query_blocks: int,
    calibrate: bool,
) -> _Tries:
    if rule.pattern == "skip":
        tokens = _some_tokens(out.shape[2], call)  # nothing is computed, so any queries will do
        return _Tries(tokens, (-out[:, :, tokens].float(),) * len(tails))
    pattern = pattern_for(rule.pattern, rule.density, rule.options, call.grid, call.segments, call.block)
    group = Group(pattern)
    call = replace(call, memory=remembered.memory)
    if calibrate:
        pattern.prepare(sub_call(group, call), out)
    laid = lay_out([(group, select(group, call))], call)
    blocks, tokens = sample(laid, call, query_blocks)
    true = out[:, :, tokens].float()
    found = (attend_blocks(call, laid, tail, blocks)[:, :, tokens].float() - true for tail in tails)
    return _Tries(tokens, tuple(found), laid)


def kept_map(selection: Selection, cells: int) -> torch.Tensor:
    """float32 [H|1, cells, cells]: the share of the token pairs that are kept between runs of tokens."""
    of_queries, of_keys = (_tokens_of_cells(blocks, cells) for blocks in (selection.queries, selection.keys))
    pairs = of_queries @ selection.mask[0].float() @ of_keys.mT
    sizes = of_queries.sum(-1, keepdim=True)
    return pairs / (sizes @ sizes.mT)


def _tokens_of_cells(blocks: Blocks, cells: int) -> torch.Tensor:
    """float32 [H|1, cells, n]: how many tokens of a cell are in each block; a cell is a run of tokens of the grid."""
    of_token = blocks.block_of_token()[0]
    tokens = of_token.shape[-1]
    cell = torch.arange(tokens, device=of_token.device) // -(-tokens // cells)
    counts = torch.zeros(of_token.shape[0], cells * blocks.count, device=of_token.device)
    counts.scatter_add_(1, cell * blocks.count + of_token, torch.ones_like(of_token, dtype=torch.float32))
    return counts.unflatten(1, (cells, blocks.count))


def sample(laid: Laid, call: Call, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query blocks to compute and tokens to look at: the same ones in every step of a layer.

    Where heads have query blocks of their own, all are computed, and some tokens looked at.
    """
    layout = laid.layout
    order = layout.query_order
    if layout.query_bounds.shape[:2] != (1, 1) or (order is not None and order.shape[:2] != (1, 1)):
        return torch.arange(layout.query_blocks, device=call.device), _some_tokens(layout.q_len, call)
    generator = torch.Generator().manual_seed(call.layer)
    chosen = torch.randperm(layout.query_blocks, generator=generator)[:count].sort().values
    bounds = layout.query_bounds[0, 0].tolist()
    places = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in chosen.tolist()]).to(call.device)
    return chosen.to(call.device), places if order is None else order[0, 0, places]


TOKENS = 768
"""So many are looked at where they cannot be whole blocks."""


def _some_tokens(tokens: int, call: Call) -> torch.Tensor:
    generator = torch.Generator().manual_seed(call.layer)
    return torch.randperm(tokens, generator=generator)[:TOKENS].sort().values.to(call.device)
