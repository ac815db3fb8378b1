"""Carrying a `Caching` out in one transformer: its blocks run, or what they added before stands in.

The lists of blocks are replaced by ones that hold the same modules under the same names, and differ only when a call of
the transformer walks over them. A reused call walks over one stand-in for all blocks. So blocks themselves are not
touched, and what was compiled of them stays compiled.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pointillist.accel import bridge
from pointillist.accel.memory import check_fits, held_bytes
from pointillist.accel.run_state import wrap
from pointillist.accel.site import Runtime
from pointillist.accel.step_cache.decider import Seen
from pointillist.accel.step_cache.policy import Caching, CachingError
from pointillist.accel.step_cache.predictors import PREDICTORS

Streams = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states, and those of the text where blocks change them."""


class StepCache:
    """Of one transformer. All that it remembers lies in the runtime's memory, by branch and generation."""

    def __init__(
        self,
        caching: Caching,
        runtime: Runtime,
        name: str,
        transformer: Any,
        model: str,
        branches: Callable[[str], int],
    ) -> None:
        """
        Args:
            branches: how many guidance passes a step has, by the name of the first.

        Raises:
            CachingError: the transformer's blocks are not known, and the caching needs them.
        """
        self._caching, self._runtime, self._name, self._model = caching, runtime, name, model
        self._branches = branches
        self._decider = caching.made
        self._kept, self._predict = PREDICTORS[caching.predictor]
        self._transformer = transformer
        self._lists = bridge.block_lists(transformer)
        if not self._lists and (caching.level == "stack" or self._decider.blocks_before):
            raise CachingError(
                f"the blocks of {type(transformer).__name__} are not known to Diffusers; take another cache, "
                "at level=output"
            )
        self._level = "stack" if self._lists and caching.level != "output" else "output"
        self._passage: _Passage | None = None
        self.seam: Any = None
        """The `parallel.seam.Seam` of the transformer, where it is split over processes."""

    def install(self) -> Callable[[], None]:
        """Returns the undo."""
        if self._level == "output":
            return wrap(self._transformer, "forward", self._whole)
        ours = {name: _Watched(blocks, self, number) for number, (name, blocks) in enumerate(self._lists.items())}
        self._transformer._modules.update(ours)

        def undo() -> None:
            for name, watched in ours.items():
                if self._transformer._modules.get(name) is watched:
                    self._transformer._modules[name] = self._lists[name]

        return undo

    def whole(self, streams: Streams, stay: bool = True) -> Streams:
        """All tokens, of those of this process; unless `stay`, what follows has all of them too."""
        return streams if self.seam is None else self.seam.whole(streams, stay)

    def enter(self, x: torch.Tensor) -> None:
        """A call of the transformer begins, with latents x."""
        self._passage = _Passage(self, self._seen(x))

    def modulated(self, modulation: torch.Tensor) -> None:
        """What modulates the blocks in the running call."""
        if self._passage is not None:
            self._passage.seen.modulation = modulation

    def leave(self, output: Any) -> bool:
        """It has ended and gave `output`; None if it failed. Whether that was reused."""
        passage, self._passage = self._passage, None
        if passage is None or output is None:
            return False
        passage.finish(bridge.parts_of(output)[0])
        return bool(passage.reused)

    def blocks(self, number: int, blocks: list[torch.nn.Module]) -> Iterator[Callable[..., Any]]:
        """What the running call is to walk over in place of the `number`-th list of blocks."""
        if self._passage is None:
            return iter(blocks)
        return self._passage.walk(number, blocks)

    def _whole(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the transformer's forward pass, where outputs are reused."""
        passage = self._passage
        assert passage is not None, "the hooks of accelerate run before the forward pass"
        if not passage.decide():
            output = original(*args, **kwargs)
            self._form, parts = bridge.Form.of(output), bridge.parts_of(output)
            for number, part in enumerate([passage.over(parts[0]), *parts[1:]]):
                passage.remember(("output", number), part, None)
            self._parts = len(parts)
            return output
        first, *others = (passage.predict(("output", number))[0] for number in range(self._parts))
        return self._form.give([passage.under(first), *others])

    def _seen(self, x: torch.Tensor) -> Seen:
        state = self._runtime.state
        shapes = (x.shape, x.dtype, x.device)
        memory = self._runtime.memory(f"{self._name} cache", shapes)
        return Seen(
            step=state.step or 0, steps=max(1, len(state.sigmas)), x=x, memory=memory.setdefault("decider", {}),
            branch=state.branch, model=self._model,
        )  # fmt: skip


class _Passage:
    """One call of the transformer."""

    def __init__(self, cache: StepCache, seen: Seen) -> None:
        self.cache, self.seen = cache, seen
        self.reused: bool | None = None
        state = cache._runtime.state
        shapes = (seen.x.shape, seen.x.dtype, seen.x.device)
        self._memory = cache._runtime.memory(f"{cache._name} cache", shapes)
        self._shared = cache._runtime.memory(f"{cache._name} cache", shapes, every_branch=True)
        self._outside = state.step is None
        self._position = state.sigmas[state.step] if state.step is not None and state.sigmas else 0.0
        plan = cache._runtime.plan
        self._kind = "dense" if plan is None else plan.schedule.kind(state.step, state.sigmas)

    def decide(self) -> bool:
        """Whether this call reuses; decided once, after the decider's blocks have run."""
        if self.reused is None:
            self.reused, agreement = self._decide(), self.cache._runtime.agreement
            if agreement is not None:  # a process that computes would wait forever for one that reuses
                self.reused = agreement.first_of(self.reused)
            self._note()
        return self.reused

    def _decide(self) -> bool:
        cache, seen, memory = self.cache, self.seen, self._memory
        if (
            self._outside or cache._runtime.before_region
        ):  # the next step takes a part of the tokens through this one's keys
            return False
        row = memory.get("in a row", 0)
        decider, caching = cache._decider, cache._caching
        if decider.SHARED and self._shared.get("decided", (None, None))[0] == seen.step:
            wished = self._shared["decided"][1]
        else:
            if self._kind == "region":
                wished = False
            elif caching.decider == "schedule":
                wished = self._kind == "cached"
            else:
                wished = decider.reuse(seen) and caching.may_reuse(seen.step, seen.steps, row)
            wished = wished and not self._switched()
            self._shared["decided"] = (seen.step, wished)
        return bool(wished and "last" in memory and not memory.get("in part"))

    def _switched(self) -> bool:
        """Attention has just become sparse, which distances would take for a change of the clip."""
        if not self.cache._decider.ADAPTIVE:
            return False
        return self._kind == "sparse" and self._memory.get("kind", self._kind) == "dense"

    def walk(self, number: int, blocks: list[torch.nn.Module]) -> Iterator[Callable[..., Any]]:
        """The blocks of a list, the first and the last of them watched, or a stand-in for them."""
        before = self.cache._decider.blocks_before if number == 0 else 0
        if before >= len(blocks):
            raise CachingError(f"{before} blocks are to run before a decision, but the first list has {len(blocks)}")
        if before:
            self._front_in: torch.Tensor | None = None
            for place, block in enumerate(blocks[:before]):
                yield _Watching(block, self, front=(place == 0, place == before - 1))
        if self.decide():
            yield _StandIn(self, number, blocks[-1])
            return
        rest = blocks[before:]
        for place, block in enumerate(rest):
            first, end = place == 0, place == len(rest) - 1
            yield _Watching(block, self, edge=(number, first, end)) if first or end else block

    def front(self, hidden: torch.Tensor, entering: bool) -> None:
        """Hidden states before or behind the decider's blocks."""
        if entering:
            self._front_in = hidden
        else:
            assert self._front_in is not None
            self.seen.front = self.cache.whole((hidden, None))[0] - self._front_in

    def edge(self, number: int, streams: Streams, entering: bool) -> None:
        """Hidden states where the part of a list begins or ends that may be reused."""
        streams = self.cache.whole(streams)
        if entering:
            self._entered = streams
        else:
            hidden, text = streams
            text_in = self._entered[1]
            self.remember(
                number, hidden - self._entered[0], None if text is None or text_in is None else text - text_in
            )

    def over(self, out: torch.Tensor) -> torch.Tensor:
        """What the model adds to its latents, where both have one shape (EasyCache)."""
        return out - self.seen.x if out.shape == self.seen.x.shape else out

    def under(self, found: torch.Tensor) -> torch.Tensor:
        """The inverse of `over`."""
        return found + self.seen.x if found.shape == self.seen.x.shape else found

    def remember(self, what: Any, hidden: torch.Tensor, text: torch.Tensor | None) -> None:
        """Keep what was just computed, unless it is of a part of the tokens."""
        if self._outside or self.cache._runtime.rows is not None:
            return
        for stream, residual in (("hidden", hidden), ("text", text)):
            if residual is not None:
                history = self._memory.setdefault(("history", what, stream), [])
                history.append((self._position, residual))
                del history[: -self.cache._kept]

    def predict(self, what: Any) -> Streams:
        """What stands in now for what was kept."""
        found = []
        for stream in ("hidden", "text"):
            history = self._memory.get(("history", what, stream))
            found.append(self.cache._predict(history, self._position) if history else None)
        assert found[0] is not None
        return found[0], found[1]

    def finish(self, out: torch.Tensor) -> None:
        """The call gave `out`."""
        memory = self._memory
        if self._outside:
            return
        if not self.reused:
            self._computed(out)
        else:
            memory["in a row"] = memory.get("in a row", 0) + 1
        held = self.cache._runtime.held(" cache")
        record = self.cache._runtime.record
        record.held["step cache"] = max(record.held.get("step cache", 0), held)

    def _computed(self, out: torch.Tensor) -> None:
        memory = self._memory
        memory["in part"] = self.cache._runtime.rows is not None
        if memory["in part"]:  # what was kept is older than these tokens: the next step is computed
            return
        memory.update({"in a row": 0, "last": self.seen.step, "kind": self._kind})
        self.cache._decider.computed(self.seen, out)
        if "needed" not in memory:
            memory["needed"] = self._check_memory(out)

    def _check_memory(self, out: torch.Tensor) -> int:
        """Bytes that all branches will keep, as the first residuals tell. Raises MemoryRefusedError."""
        cache, runtime = self.cache, self.cache._runtime
        place = f"{cache._name} cache"
        histories = [value for key, value in self._memory.items() if isinstance(key, tuple) and key[0] == "history"]
        branches = max(cache._branches(self.seen.branch), runtime.branches(place) - 1)  # one place is all branches'
        decider = cache._decider.bytes_kept(self.seen, out, branches)

        def needed(kept: int) -> int:
            return branches * kept * held_bytes([history[-1] for history in histories]) + decider

        total = needed(cache._kept)
        runtime.record.predicted["step cache"] = total
        ways: dict[str, int | None] = {"predictor=last": needed(1)} if cache._kept > 1 else {}
        if cache._level == "stack" and not cache._decider.blocks_before:
            ways["level=output"] = branches * cache._kept * out.nbytes + decider
        what = f"the cache keeps {cache._kept} residuals of {branches} guidance branches"
        check_fits(what, total - runtime.held(" cache"), out.device, ways | {"cache='none' keeps nothing": None})
        return total

    def _note(self) -> None:
        record = self.cache._runtime.record
        record.decisions.append((self.seen.step, self.seen.branch, bool(self.reused), self.seen.memory.get("distance")))


class _Watched(torch.nn.ModuleList):
    """The same blocks under the same names, walked over as a cache says."""

    def __init__(self, blocks: torch.nn.ModuleList, cache: StepCache, number: int) -> None:
        super().__init__(blocks)
        self.training = blocks.training
        self._cache, self._number = cache, number

    def __iter__(self) -> Iterator[Any]:
        return self._cache.blocks(self._number, list(self._modules.values()))  # type: ignore[arg-type]


class _Watching:
    """A block whose input or output is looked at."""

    def __init__(
        self,
        block: torch.nn.Module,
        passage: _Passage,
        front: tuple[bool, bool] = (False, False),
        edge: tuple[int, bool, bool] = (0, False, False),
    ) -> None:
        self._block, self._passage, self._front, self._edge = block, passage, front, edge

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        streams, (number, first, end) = bridge.streams_of(self._block), self._edge
        if self._front[0]:
            self._passage.front(streams.into(args, kwargs)[0], entering=True)
        if first:
            self._passage.edge(number, streams.into(args, kwargs), entering=True)
        output = self._block(*args, **kwargs)
        if self._front[1]:
            self._passage.front(streams.out_of(output)[0], entering=False)
        if end:
            self._passage.edge(number, streams.out_of(output), entering=False)
        return output


class _StandIn:
    """In place of blocks: adds what they added before."""

    def __init__(self, passage: _Passage, number: int, block: torch.nn.Module) -> None:
        self._passage, self._number, self._block = passage, number, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        streams = bridge.streams_of(self._block)
        hidden, text = self._passage.cache.whole(streams.into(args, kwargs), stay=False)
        added, added_text = self._passage.predict(self._number)
        if text is not None and added_text is not None:
            text = text + added_text
        return streams.give(hidden + added, text)
