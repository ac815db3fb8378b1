"""What happens at one site when its q, k and v are final."""

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pointillist.accel.bridge import Mask, SiteHandler
from pointillist.accel.layouts import Group, Laid, lay_out, pattern_for, select, sub_call
from pointillist.accel.memory import held_bytes
from pointillist.accel.models.family import Family
from pointillist.accel.patterns.pattern import Call, Pattern, Selection
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.regions import keys
from pointillist.accel.report import AttentionCall, Record
from pointillist.accel.run_state import RunState
from pointillist.accel.sequence import NotTheGridError, Sequence, sequence_of
from pointillist.accel.tails import attend, attend_blocks, remember_kept_mass, remember_loss, with_loss
from pointillist.accel.tiles import Grid, Segment
from pointillist.accel.timing import now
from pointillist.kernels import BREAK_EVEN, choose_backend

SPARSE_PART = 0.15
"""Of the time of a dense call, what a sparse one takes beside its pairs."""
Observer = Callable[[str, str, int | None, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Told of every attention call: site, branch, step, and q, k, v, out [B, S, H, D]. What it returns takes out's place,
unless it is None."""
LayoutObserver = Callable[[str, str, int | None, Laid], None]
"""Told of every sparse attention call: site, branch, step, and its layout."""


class Runtime:
    """What all sites of one accelerated pipeline share: the plan, where the run is, and what has run."""

    def __init__(self, plan: Plan | None, backend: str) -> None:
        self.plan = plan
        self.state = RunState()
        self.record = Record()
        self.observer: Observer | None = None
        self.layout_observer: LayoutObserver | None = None
        self.rows: torch.Tensor | None = None
        """int64 [B, n]: the tokens that the running call computes; None is all."""
        self.keeps_keys = False
        """Whether a step to come computes a part of the tokens only, and needs the keys of this one."""
        self.before_region = False
        """Whether the next step is such a one, so that this one must be computed."""
        self.agreement: Any = None
        """The `parallel.agreement.Agreement` of the processes that share the video; None where there is one."""
        self.keeps_how: tuple[str, ...] = ()
        """By layer: see `Regions.keys`."""
        self.kept_steps = 1
        """Keys and values of so many are kept."""
        self.only_keys = False
        """Whether the running call of an attention module is for its keys and values alone."""
        self._wish = backend
        self._backends: dict[torch.device, tuple[str, str]] = {}
        self._memories: dict[tuple[str, str], tuple[Any, dict[Any, Any]]] = {}
        self._expert = ""

    def blocks_of_all(self, blocks: torch.Tensor, count: int) -> tuple[int, int]:
        """How many query blocks the heads of all processes want together, and of how many."""
        if self.agreement is None:
            return len(blocks), count
        wanted = self.agreement.union(torch.zeros(count, dtype=torch.bool).index_fill_(0, blocks.cpu(), True))
        return int(wanted.sum()), len(wanted)

    def backend(self, device: torch.device) -> tuple[str, str]:
        """What computes sparse calls on `device`, and why."""
        if device not in self._backends:
            self._backends[device] = choose_backend(device, self._wish)
        return self._backends[device]

    def memory(self, place: str, shapes: Any, every_branch: bool = False) -> dict[Any, Any]:
        """What is remembered at a place (a site, or a transformer) in this branch of this generation, or in all.

        Another expert, other shapes, and a new generation start empty; outside of a generation nothing is kept.
        """
        if self.state.step is None:
            return {}
        if self.state.expert != self._expert:
            self.forget()
            self._expert = self.state.expert
        key = (place, "" if every_branch else self.state.branch)
        known, memory = self._memories.get(key, (None, {}))
        if known != shapes:
            memory = {}
        self._memories[key] = (shapes, memory)
        return memory

    def held(self, ending: str) -> int:
        """Bytes that are remembered at all places whose names end so."""
        return held_bytes([memory for (place, _), (_, memory) in self._memories.items() if place.endswith(ending)])

    def branches(self, place: str) -> int:
        """How many guidance branches have been at a place in this generation."""
        return sum(each == place for each, _ in self._memories)

    def forget(self) -> None:
        """Nothing of this generation is needed any more."""
        self._memories.clear()


class Site:
    """One self-attention: a layer of a transformer. What outlives a call lies in the runtime's memory."""

    def __init__(
        self,
        name: str,
        layer: int,
        family: Family,
        dense: SiteHandler,
        runtime: Runtime,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.name = name
        self.hidden_states: torch.Tensor | None = None
        """What went into the attention module in the running call, for patterns that ask for it."""
        self.heads: tuple[int, ...] | None = None
        """Those that this process computes, where a video is split over several; None is all."""
        self.ring: Any = None
        """The `parallel.ring.Ring` of the running call, if keys lie on several processes."""
        self.runtime = runtime
        self._layer, self._family = layer, family
        self._dense = dense
        self._runtime = runtime
        self._weights = {} if weights is None else weights
        self._entry: tuple[Any, int] = (None, 0)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: Mask = None
    ) -> torch.Tensor:
        """Attention of q [B, S, H, D] over k, v [B, Sk, H, D] as the plan says; also [B, S, H, D]."""
        state, record, plan = self._runtime.state, self._runtime.record, self._runtime.plan
        if state.thread != threading.get_ident():
            raise RuntimeError(
                f"{self.name} was reached outside of its transformer's forward call, or accelerated "
                "pipelines run in two threads at once; run one at a time in a process"
            )
        record.heads = q.shape[2]
        if self._runtime.only_keys:
            keys.keep(self._keys(), k, v, "full", state.sigma, 1)
            return torch.empty_like(q)
        start, density = now(q.device), None
        self._count_entry()
        if self._runtime.rows is not None:
            out = self._part(self._runtime.rows, q, k, v, scale, mask)
            record.calls.append(AttentionCall(self.name, state.branch, state.step, None, start, now(q.device), True))
            return out
        kind = "dense" if plan is None else plan.schedule.kind(state.step, state.sigmas)
        lies, why = self._sequence(plan, kind, q, k, mask)
        if plan is None or (kind == "dense" and not before_sparse(plan, state)):
            out = self._all_pairs(q, k, v, scale, mask, lies)
        elif kind == "dense":
            out = self._all_pairs(q, k, v, scale, mask, lies)
            if lies is not None:
                for each in self._groups_to_come(plan, lies, q):
                    call = self._call(plan, each, lies, q, k, v, scale)
                    seen = out if self.ring is not None else lies.into(out)
                    self._learn(plan, each, call, seen.transpose(1, 2))
        elif lies is None or (groups := self._groups(plan, lies, q, state.step)) is None:
            out = self._all_pairs(q, k, v, scale, mask, lies)  # sparse, or to be cached with nothing to reuse
            self._note_fallback(plan, q, why)
        else:
            found, density = self._sparse(plan, groups, self._call(plan, groups, lies, q, k, v, scale))
            out = found if self.ring is not None else lies.back(found, q.shape[1])
        if self._runtime.keeps_keys:
            how = self._runtime.keeps_how[self._layer]
            keys.keep(self._keys(), k, v, how, state.sigma, self._runtime.kept_steps)
        record.calls.append(AttentionCall(self.name, state.branch, state.step, density, start, now(q.device)))
        if self._runtime.observer is not None:
            instead = self._runtime.observer(self.name, state.branch, state.step, q, k, v, out)
            out = out if instead is None else instead
        return out

    def _all_pairs(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        mask: Mask,
        lies: Sequence | None,
    ) -> torch.Tensor:
        """Dense attention; q, k, v and the output are [B, S, H, D]."""
        if self.ring is None:
            return self._dense(q, k, v, scale, mask)
        return self.ring.dense(q, k, v, scale, self._runtime.backend(q.device)[0], mask, lies)

    def _count_entry(self) -> None:
        """Mochi attends to one entry of the batch after the other: which of them this is, within the running call."""
        call, entry = self._entry
        self._entry = (self._runtime.state.call, entry + 1 if call is self._runtime.state.call else 0)

    @property
    def _place(self) -> str:
        """Where this call's memory lies."""
        entry = self._entry[1]
        return self.name if not entry else f"{self.name}, entry {entry}"

    def _sequence(
        self, plan: Plan | None, kind: str, q: torch.Tensor, k: torch.Tensor, mask: Mask
    ) -> tuple[Sequence | None, str]:
        """How the tokens lie, if that matters in this call; or why it cannot be told."""
        state = self._runtime.state
        if self.ring is not None:
            q, k = (self.ring.whole_shape(x) for x in (q, k))
        elif plan is None or (kind == "dense" and not before_sparse(plan, state)):
            return None, ""
        assert state.tokens is not None, "a site runs inside a transformer call"
        try:
            return sequence_of(self._family, state.tokens, q, k, mask), ""
        except NotTheGridError as error:
            return None, str(error)

    def _keys(self) -> dict[Any, Any]:
        """What is kept for steps that compute a part of the tokens."""
        return self._runtime.memory(f"{self._place} keys", self._runtime.state.grid)

    def _part(
        self,
        rows: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        mask: Mask,
    ) -> torch.Tensor:
        """Attention of some tokens' queries over all keys; q, k, v and the output are [B, n, H, D].

        Text beside the video is among them, all of it.
        """
        memory, plan = self._keys(), self._runtime.plan
        if "k" not in memory:  # none are kept: these tokens see each other
            return self._dense(q, k, v, scale, mask)
        lies, rows = self._places(rows, keys.length(memory))
        every_k, every_v = keys.renewed(memory, rows, k, v, self._runtime.state.sigma, self._runtime.kept_steps)
        assert plan is not None, "regions are a plan's"
        if mask is not None:  # of text beside the video; every other token of it is seen
            shown = mask[:, 0, 0].expand(len(rows), -1)
            every = torch.ones(len(rows), every_k.shape[1], dtype=torch.bool, device=mask.device)
            return self._dense(q, every_k, every_v, scale, every.scatter(1, rows, shown)[:, None, None])
        groups: tuple[Group, ...] | None
        laid, groups = memory.get("laid", (None, None))
        if laid is None or groups is None:
            return self._dense(q, every_k, every_v, scale, None)
        blocks = torch.unique(memory["block of token"].gather(2, rows[:, None].expand(-1, q.shape[2], -1)))
        count, of = self._runtime.blocks_of_all(blocks, laid.layout.query_blocks)
        sparse = count / of * (memory["kept"] + SPARSE_PART)
        if sparse > rows.shape[1] / every_k.shape[1]:
            return self._dense(q, every_k, every_v, scale, None)
        index = rows[:, :, None, None].expand(-1, -1, *q.shape[2:])
        every_q = torch.zeros_like(every_k).scatter_(1, index, q)
        call = self._call(plan, groups, lies, every_q, every_k, every_v, scale)
        return attend_blocks(call, laid, plan.tail, blocks).transpose(1, 2).gather(1, index)

    def _places(self, rows: torch.Tensor, length: int) -> tuple[Sequence, torch.Tensor]:
        """How a sequence of so many tokens lies; int64 [B, n], the places of rows of the video and of the rest."""
        tokens = self._runtime.state.tokens
        assert tokens is not None, "a site runs inside a transformer call"
        segments = self._family.segments(tokens, length)
        assert segments is not None, "the step before had the same tokens"
        if len(segments) == 1:
            return Sequence(segments, length), rows
        parts = [
            rows + each.start
            if each.kind == "video"
            else torch.arange(each.start, each.stop, device=rows.device).expand(len(rows), -1)
            for each in segments
        ]
        return Sequence(segments, length), torch.cat(parts, 1)

    def _groups_to_come(self, plan: Plan, lies: Sequence, q: torch.Tensor) -> list[tuple[Group, ...]]:
        """What later sparse steps of this generation will do here, each once."""
        state = self._runtime.state
        assert state.step is not None, "a dense step is known"
        later = range(state.step + 1, len(state.sigmas))
        sparse = [step for step in later if plan.schedule.kind(step, state.sigmas) == "sparse"]
        each_once = dict.fromkeys(self._groups(plan, lies, q, step) for step in sparse)
        return [each for each in each_once if each is not None]

    def _groups(self, plan: Plan, lies: Sequence, q: torch.Tensor, step: int | None) -> tuple[Group, ...] | None:
        """The patterns of this site's heads in a sparse step; None if all of it is dense."""
        grid, rules = self._runtime.state.grid, self._rules(plan, step)
        assert grid is not None, "a site runs inside a transformer call"
        if _kept(rules) == 1 or self._fallback(plan, rules, q):
            return None
        return _groups_of(rules, grid, lies.segments, plan.block, self.heads)

    def _rules(self, plan: Plan, step: int | None) -> tuple[Rule, ...]:
        state = self._runtime.state
        assert state.grid is not None, "a site runs inside a transformer call"
        share = 1.0 if step is None else state.sigmas[step] / state.sigmas[0]
        return plan.carried(plan.rules(self._layer, share, state.expert), math.prod(state.grid))

    def _fallback(self, plan: Plan, rules: tuple[Rule, ...], q: torch.Tensor) -> str:
        """Why a call runs densely although its rules are sparse; "" if it does not. q is [B, S, H, D]."""
        tokens, density = q.shape[1] if self.ring is None else self.ring.tokens, _kept(rules)
        if tokens < plan.min_tokens:
            return f"{tokens} tokens are fewer than {plan.min_tokens}, where sparse starts to pay"
        if plan.break_even and density > BREAK_EVEN[self._runtime.backend(q.device)[0], plan.tail != "none"]:
            return f"density {density:.2f} is so high that sparse attention would not be faster"
        return ""

    def _note_fallback(self, plan: Plan, q: torch.Tensor, why: str) -> None:
        rules = self._rules(plan, self._runtime.state.step)
        if _kept(rules) < 1:
            self._runtime.record.notes[f"dense: {why or self._fallback(plan, rules, q)}"] += 1

    def _call(
        self,
        plan: Plan,
        groups: tuple[Group, ...],
        lies: Sequence,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
    ) -> Call:
        """What patterns see of this call; q, k, v are [B, S, H, D]. Stages that differ here share no memory."""
        if self.ring is None:
            q, k, v = (lies.into(x) for x in (q, k, v))
        state, record = self._runtime.state, self._runtime.record
        assert state.grid is not None
        record.backend = self._runtime.backend(q.device)
        return Call(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            grid=state.grid,
            segments=lies.segments,
            key_lengths=lies.key_lengths,
            block=plan.block,
            hoist=plan.hoist,
            heads=self.heads,
            layer=self._layer,
            step=state.step or 0,
            steps=max(1, len(state.sigmas)),
            memory=self._runtime.memory(self._place, (state.grid, q.shape, q.device)).setdefault(groups, {}),
            weights=self._weights,
            hidden_states=self.hidden_states,
            backend=record.backend[0],
            notes=record.notes,
        )

    def _sparse(self, plan: Plan, groups: tuple[Group, ...], call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [B, S, H, D] and the density, 0-d."""
        laid = self._lay_out(plan, groups, call)
        if self._runtime.layout_observer is not None:
            self._runtime.layout_observer(self.name, self._runtime.state.branch, call.step, laid)
        if self._runtime.keeps_keys and not any(_finishes(group.pattern) for group in groups):
            kept = _kept(self._rules(plan, call.step))
            self._keys().update({"laid": (laid, groups), "kept": kept, "block of token": _blocks_of_tokens(laid, call)})
        if self.ring is not None:
            return with_loss(call, self.ring.sparse(call, laid, plan.tail)).transpose(1, 2), laid.density
        out = attend(call, laid, plan.tail, plan.quantized)
        for group in groups:
            if _finishes(group.pattern):
                finished = group.pattern.finish(sub_call(group, call), group.of(out))
                out = finished if group.heads is None else out.index_copy(1, group.index(call.device), finished)
        if plan.residual and "lost output" not in call.memory:
            call.notes["no residual: there was no dense step to remember"] += 1
        return out.transpose(1, 2), laid.density

    def _learn(self, plan: Plan, groups: tuple[Group, ...], call: Call, out: torch.Tensor) -> None:
        """Patterns and the tail look at the last dense step, whose output is `out` [B, H, S, D]."""
        for group in groups:
            call.memory.pop(("selection", group), None)
            follows = call.layer % plan.reuse_layers != 0 and not _finishes(group.pattern)
            if type(group.pattern).prepare is not Pattern.prepare and not follows:
                group.pattern.prepare(sub_call(group, call), group.of(out))
        if plan.tail == "rescaled" or plan.residual:
            laid = self._lay_out(plan, groups, call)
            if plan.tail == "rescaled":
                remember_kept_mass(call, laid, out)
            if plan.residual:
                sparse = None if self.ring is None else self.ring.sparse(call, laid, plan.tail)
                remember_loss(call, laid, out, plan.tail, plan.quantized, sparse)

    def _lay_out(self, plan: Plan, groups: tuple[Group, ...], call: Call) -> Laid:
        parts = [(group, self._selection(plan, group, call)) for group in groups]
        return lay_out(parts, call, plan.dense_first_frame, call.key_lengths)

    def _selection(self, plan: Plan, group: Group, call: Call) -> Selection:
        """The group's own choice in this call, or an earlier one where the plan says so."""
        if group.pattern.STATIC or _finishes(group.pattern) or plan.reuse_layers == plan.reuse_steps == 1:
            return select(group, call)
        state = self._runtime.state
        shapes = (call.grid, call.q.shape, call.device)
        of_layers = self._runtime.memory(state.expert, shapes)
        for memory, fresh in (
            (call.memory, lambda made: call.step - made < plan.reuse_steps),
            (of_layers, lambda made: made == call.step and call.layer % plan.reuse_layers != 0),
        ):
            made, selection = memory.get(("selection", group), (None, None))
            if made is not None and fresh(made):
                break
        else:
            made, selection = call.step, select(group, call)
            of_layers["selection", group] = (made, selection)
        if plan.reuse_steps > 1:
            call.memory["selection", group] = (made, selection)
        return selection


def _blocks_of_tokens(laid: Laid, call: Call) -> torch.Tensor:
    """int64 [B, H, S]: the query block of each token."""
    batch, heads, length = call.q.shape[:3]
    of_place = laid.layout.query_block_of_place(batch, heads).expand(batch, heads, -1)
    order = laid.layout.query_order
    if order is None:
        return of_place.long()
    return torch.empty_like(of_place, dtype=torch.int64).scatter_(
        2, order.expand(batch, heads, length), of_place.long()
    )


def _kept(rules: tuple[Rule, ...]) -> float:
    """The share of the pairs that all heads together compute."""
    return sum(rule.kept for rule in rules) / len(rules)


def _finishes(pattern: Pattern) -> bool:
    """Whether the pattern has the last word on the output, and so must know its own choice of pairs."""
    return type(pattern).finish is not Pattern.finish


def _groups_of(
    rules: tuple[Rule, ...],
    grid: Grid,
    segments: tuple[Segment, ...],
    block: int,
    mine: tuple[int, ...] | None = None,
) -> tuple[Group, ...]:
    """Heads with equal rules together, in the order of their first heads; of the heads `mine` alone, counted among
    them."""
    heads: dict[Pattern, list[int]] = {}
    chosen = rules if mine is None or len(rules) == 1 else tuple(rules[head] for head in mine)
    for head, rule in enumerate(chosen):
        pattern = pattern_for(rule.pattern, rule.density, rule.options, grid, segments, block)
        heads.setdefault(pattern, []).append(head)
    return tuple(Group(pattern, None if len(heads) == 1 else tuple(each)) for pattern, each in heads.items())


def before_sparse(plan: Plan, state: RunState) -> bool:
    """Whether the running step is the last dense one before sparse ones."""
    if state.step is None or state.step + 1 >= len(state.sigmas):
        return False
    later = (plan.schedule.kind(step, state.sigmas) for step in range(state.step + 1, len(state.sigmas)))
    return next((kind for kind in later if kind not in ("cached", "region")), "") == "sparse"
