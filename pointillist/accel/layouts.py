"""From the patterns of a site's heads to one layout: one launch serves all heads, whatever their patterns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from pointillist.accel.blocks import Blocks, blocks_in, places_in
from pointillist.accel.patterns import pattern_class
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, index_of, video_of, without_padding
from pointillist.accel.tiles import Grid, Segment
from pointillist.kernels import BlockLayout, uniform_bounds


@dataclass(frozen=True)
class Group:
    """Heads that share a pattern."""

    pattern: Pattern
    heads: tuple[int, ...] | None = None
    """None is all heads of the site."""

    def index(self, device: torch.device) -> torch.Tensor:
        """int64 [heads]: their numbers, on the device."""
        assert self.heads is not None, "one group has all heads, and then there is no other"
        return index_of(self.heads, device)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """These heads of x [B, H, …]."""
        return x if self.heads is None else x.index_select(1, self.index(x.device))


@dataclass(frozen=True)
class Laid:
    """A layout, and what it was made of."""

    layout: BlockLayout
    density: torch.Tensor
    """0-d: the kept share of the video × video pairs."""
    parts: tuple[tuple[Group, Selection], ...]
    """Their query blocks and key blocks are the layout's first ones; exact ones follow."""


@lru_cache(maxsize=4096)
def pattern_for(
    name: str,
    density: float,
    options: tuple[tuple[str, Any], ...],
    grid: Grid,
    segments: tuple[Segment, ...],
    block: int,
) -> Pattern:
    """The pattern `name` at a density, for these shapes."""
    return pattern_class(name).at_density(density, grid, segments, block, **dict(options))


def select(group: Group, call: Call) -> Selection:
    """The pairs that the group's pattern keeps of a call of all heads; static ones cost nothing but once."""
    pattern = group.pattern.at_step(call.step, call.grid)
    if pattern.STATIC:
        return _static_selection(pattern, call.grid, call.segments, call.block, call.device)
    return pattern.select(sub_call(group, call))


def sub_call(group: Group, call: Call) -> Call:
    """The call as the pattern of `group` sees it: its heads, and its own memory."""
    memory = call.memory.setdefault(group, {})
    q, k, v = (group.of(x) for x in (call.q, call.k, call.v))
    heads = group.heads
    if call.heads is not None:  # the call is of a part of the site's heads
        heads = call.heads if heads is None else tuple(call.heads[head] for head in heads)
    return replace(call, q=q, k=k, v=v, memory=memory, heads=heads)


def lay_out(
    parts: Sequence[tuple[Group, Selection]],
    call: Call,
    dense_first_frame: bool = False,
    key_lengths: torch.Tensor | None = None,
) -> Laid:
    """The layout of one attention call, built on the device without waiting for it.

    Text and condition tokens see everything and are seen by everything, in blocks of their own.

    Args:
        call: of all heads.
        dense_first_frame: queries of a video's first latent frame see everything.
        key_lengths: int64 [B], valid keys of every batch entry, where they differ: padding must be the sequence's end.
    """
    first_frame = call.grid[1] * call.grid[2] if dense_first_frame and call.grid[0] > 1 else 0
    static = key_lengths is None and all(group.pattern.STATIC for group, _ in parts)
    build = _static_layout if static else _lay_out
    return build(
        tuple(parts), call.q.shape[1], call.grid, call.segments, call.block, call.hoist, first_frame, key_lengths
    )


def forget_layouts() -> None:
    """Let go of the layouts of static patterns, which may hold much of a GPU's memory."""
    _static_layout.cache_clear()
    _static_selection.cache_clear()


@lru_cache(maxsize=256)
def _static_selection(
    pattern: Pattern, grid: Grid, segments: tuple[Segment, ...], block: int, device: torch.device
) -> Selection:
    nothing = torch.empty(0, device=device)
    return pattern.select(Call(nothing, nothing, nothing, 1.0, grid, segments, block))


def _lay_out(
    parts: tuple[tuple[Group, Selection], ...],
    heads: int,
    grid: Grid,
    segments: tuple[Segment, ...],
    block: int,
    hoist: str,
    first_frame: int,
    key_lengths: torch.Tensor | None,
) -> Laid:
    if first_frame:
        parts = tuple((group, _with_dense_rows(part, first_frame, block)) for group, part in parts)
    queries = _joined_blocks([(group, part.queries) for group, part in parts], heads)
    keys = _joined_blocks([(group, part.keys) for group, part in parts], heads)
    mask, pairs = _joined_masks(parts, heads, queries.count, keys.count)
    density = _density(mask, queries, keys)
    q_order, k_order = (_as_they_lie(blocks, grid, block, hoist) for blocks in (queries, keys))
    q_order, q_bounds, rows = _with_segments(queries, q_order, segments, block)
    k_order, k_bounds, columns = _with_segments(keys, k_order, without_padding(segments), block)
    if rows or columns:
        mask = torch.nn.functional.pad(mask, (0, columns, 0, rows), value=True)
        pairs += mask.shape[0] * mask.shape[1] * (rows * (keys.count + columns) + columns * queries.count)
    layout = BlockLayout.from_bounds(
        mask,
        q_bounds,
        k_bounds,
        _tokens(segments),
        _tokens(without_padding(segments)),
        max_query_block=max(queries.largest, block if rows else 0),
        max_key_block=max(keys.largest, block if columns else 0),
        pairs=pairs,
        query_order=q_order,
        key_order=k_order,
        key_lengths=key_lengths,
    )
    uniform = queries.uniform and keys.uniform and not rows and not columns
    return Laid(replace(layout, uniform=uniform), density, parts)


_static_layout = lru_cache(maxsize=64)(_lay_out)
"""One layout for every call, so that its work lists are made once."""


def _with_dense_rows(part: Selection, tokens: int, block: int) -> Selection:
    """The queries of the first `tokens` video tokens see everything, if need be in blocks of their own."""
    queries, dense = part.queries, part.queries.first_frame
    batch, heads, _, columns = part.mask.shape
    if dense is not None:
        mask = part.mask.clone()
        mask[:, :, :dense] = True
        return replace(part, mask=mask, pairs=part.pairs + batch * heads * dense * columns)
    inside = queries.order < tokens
    order = queries.order.gather(-1, inside.to(torch.uint8).sort(dim=-1, stable=True).indices)
    others_before = torch.nn.functional.pad((~inside).cumsum(-1, dtype=torch.int32), (1, 0))
    shape = torch.broadcast_shapes(order.shape[:2], queries.bounds.shape[:2])
    bounds = others_before.expand(*shape, -1).gather(-1, queries.bounds.long().expand(*shape, -1))
    own = uniform_bounds(tokens, block, order.device)[1:] + (order.shape[-1] - tokens)
    bounds = torch.cat([bounds, own.expand(*shape, -1)], dim=-1).int()
    dense = len(own)
    return replace(
        part,
        queries=Blocks(order, bounds, max(queries.largest, min(block, tokens))),
        mask=torch.nn.functional.pad(part.mask, (0, 0, 0, dense), value=True),
        pairs=part.pairs + batch * heads * dense * columns,
    )


def _joined_blocks(each: Sequence[tuple[Group, Blocks]], heads: int) -> Blocks:
    """The blocks of all heads; where heads have fewer than others, the rest are empty."""
    first = each[0][1]
    if all(blocks is first for _, blocks in each):
        return first
    batch = max(x.shape[0] for _, blocks in each for x in (blocks.order, blocks.bounds))
    count, tokens = max(blocks.count for _, blocks in each), first.order.shape[-1]
    order = first.order.new_empty(batch, heads, tokens)
    bounds = first.bounds.new_full((batch, heads, count + 1), tokens)
    for group, blocks in each:
        order[:, group.index(order.device)] = blocks.order
        bounds[:, group.index(order.device), : blocks.count + 1] = blocks.bounds
    return Blocks(order, bounds, max(blocks.largest for _, blocks in each))


def _joined_masks(
    parts: Sequence[tuple[Group, Selection]], heads: int, rows: int, columns: int
) -> tuple[torch.Tensor, int]:
    """The mask of all heads, and at least its number of pairs."""
    if len(parts) == 1:
        return parts[0][1].mask, parts[0][1].pairs
    batch, pairs = max(part.mask.shape[0] for _, part in parts), 0
    mask = parts[0][1].mask.new_zeros(batch, heads, rows, columns)
    for group, part in parts:
        mine = group.index(mask.device)
        mask[:, mine, : part.queries.count, : part.keys.count] = part.mask
        pairs += part.pairs * batch * len(mine) // (part.mask.shape[0] * part.mask.shape[1])
    return mask, pairs


def _as_they_lie(blocks: Blocks, grid: Grid, block: int, hoist: str) -> torch.Tensor | None:
    """The order of the blocks' tokens among the video's as they lie in the sequence; None if it is the same."""
    name = hoist or "thw"
    if blocks.name == name and blocks.order is blocks_in(name, grid, block, blocks.order.device).order:
        return None
    return places_in(hoist, grid, block, blocks.order.device)[blocks.order] if hoist else blocks.order


def _with_segments(
    blocks: Blocks, order: torch.Tensor | None, segments: tuple[Segment, ...], block: int
) -> tuple[torch.Tensor | None, torch.Tensor, int]:
    """Order and bounds of the whole sequence, video blocks first; and how many blocks the other segments have."""
    video = video_of(segments)
    others = [segment for segment in segments if segment.kind != "video"]
    if not others:
        return order, blocks.bounds, 0
    if order is None:
        order = torch.arange(video.length, device=blocks.order.device)[None, None]
    device = blocks.order.device
    tokens = torch.cat([torch.arange(each.start, each.stop, device=device) for each in others])
    starts, ends = video.length, []
    for each in others:
        ends.append(uniform_bounds(each.length, block, device)[1:] + starts)
        starts += each.length
    own = torch.cat(ends)
    order = torch.cat([order + video.start, tokens.expand(*order.shape[:2], -1)], dim=-1)
    bounds = torch.cat([blocks.bounds, own.expand(*blocks.bounds.shape[:2], -1)], dim=-1)
    return order, bounds, len(own)


def _tokens(segments: tuple[Segment, ...]) -> int:
    return sum(segment.length for segment in segments)


def _density(mask: torch.Tensor, queries: Blocks, keys: Blocks) -> torch.Tensor:
    kept = (mask.float() @ keys.sizes[..., None])[..., 0] * queries.sizes
    return kept.sum(-1).mean() / queries.order.shape[-1] ** 2
