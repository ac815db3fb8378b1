"""What one process does at the sites of a transformer that is split over several.

Under Ulysses a site sees all tokens of this process's heads, so patterns of every kind work, and only which heads they
are must be known. In a ring it sees its own queries and the keys of one process after the other: see `ring`.
"""

from typing import Any

import torch

from pointillist.accel.parallel import engine
from pointillist.accel.parallel.balance import head_costs, head_counts, spread
from pointillist.accel.parallel.ring import Ring
from pointillist.accel.parallel.seam import Seam
from pointillist.accel.parallel.tokens import places_in_a_row, tokens_in_a_row


class Share:
    """Handles the attention calls of one site in place of the site itself."""

    def __init__(self, site: Any, seam: Seam, heads: int, layer: int, balanced: bool = True) -> None:
        self._site, self._seam, self._heads, self._layer = site, seam, heads, layer
        self._balanced = balanced
        self._order: tuple[Any, tuple[int, ...]] | None = None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of this process's tokens, q, k, v [B, n, H, D] of all heads; also [B, n, H, D]. The mask is of all
        tokens, in their own order."""
        seam, site = self._seam, self._site
        order = self._head_order()
        ulysses, ring = engine.degrees(seam.config)
        engine.allow_uneven(seam.config, seam.uneven or self._heads % ulysses != 0)
        plain = order == tuple(range(self._heads))
        if not plain:
            there, back = _index(order, q.device)
            q, k, v = (x.index_select(2, there) for x in (q, k, v))
        site.heads = self._own(order)
        out = (self._in_ring if ring > 1 else self._with_all)(q, k, v, scale, mask)
        return out if plain else out.index_select(2, back)

    def _with_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        seam = self._seam
        places = places_in_a_row(seam.lengths, seam.parts, q.device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if places is None:
                return self._site(q, k, v, scale, mask)
            tokens = tokens_in_a_row(seam.lengths, seam.parts, q.device)
            q, k, v = (x.index_select(1, places) for x in (q, k, v))
            return self._site(q, k, v, scale, mask).index_select(1, tokens)

        return engine.with_all_tokens(q, k, v, seam.config, attend)

    def _in_ring(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        config = self._seam.config
        grouped = engine.degrees(config)[0] > 1
        if grouped:
            q, k, v = (engine.exchange(x, config) for x in (q, k, v))
        self._site.ring = Ring(config, self._seam.lengths)
        try:
            out = self._site(q, k, v, scale, mask)
        finally:
            self._site.ring = None
        return engine.exchange(out, config, back=True) if grouped else out

    def _head_order(self) -> tuple[int, ...]:
        """The heads, those of one process after those of the other; the same in all steps, for what sites remember."""
        runtime = self._site.runtime
        state, ulysses = runtime.state, engine.degrees(self._seam.config)[0]
        if not self._balanced or runtime.plan is None:
            return tuple(range(self._heads))
        key = (state.expert, state.sigmas)
        if self._order is None or self._order[0] != key:
            costs = head_costs(runtime.plan, self._layer, self._heads, state.expert, state.sigmas)
            self._order = (key, spread(costs, ulysses))
        return self._order[1]

    def _own(self, order: tuple[int, ...]) -> tuple[int, ...]:
        ulysses = engine.degrees(self._seam.config)[0]
        counts, place = head_counts(self._heads, ulysses), engine.places(self._seam.config)[0]
        start = sum(counts[:place])
        return order[start : start + counts[place]]


_known: dict[tuple[tuple[int, ...], torch.device], tuple[torch.Tensor, torch.Tensor]] = {}


def _index(order: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [H] on the device: the order, and its inverse."""
    if (order, device) not in _known:
        there = torch.tensor(order)
        _known[order, device] = there.to(device), there.argsort().to(device)
    return _known[order, device]
