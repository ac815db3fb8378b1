"""`BlockLayout`: which query blocks see which key blocks, in which token order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class BlockLayout:
    """The kept pairs of blocks of one attention call, as compressed rows (CSR).

    A pair is *kept* (computed exactly), *dropped* (a tail may stand in) or *forbidden* (keys beyond
    `key_lengths`: they enter nothing). Blocks are runs of places in the token order, given by their bounds.
    """

    q_len: int
    k_len: int
    query_bounds: torch.Tensor
    """int32 [B|1, H|1, nq+1], ascending from 0 to `q_len`: query block i covers places bounds[i] to bounds[i+1]."""
    key_bounds: torch.Tensor
    """int32 [B|1, H|1, nk+1], likewise for keys."""
    indptr: torch.Tensor
    """int32 [B|1, H|1, nq+1]: row i of a head is `columns[indptr[i]:indptr[i+1]]`; offsets are global."""
    columns: torch.Tensor
    """int32 [≥ pairs]: kept key blocks, ascending within a row; what lies behind the last row means nothing."""
    max_query_block: int
    """At least the size of the largest query block, known without asking the device."""
    max_key_block: int
    """Likewise for key blocks."""
    uniform: bool = False
    """Every block but the last is as large as the largest, and all heads have the same ones."""
    query_order: torch.Tensor | None = None
    """int64 [B|1, H|1, q_len]: the token at each place; None is the identity."""
    key_order: torch.Tensor | None = None
    """int64 [B|1, H|1, k_len], likewise."""
    key_lengths: torch.Tensor | None = None
    """int64 [B]: tokens from this one on are padding and forbidden; None means all are valid."""

    @classmethod
    def from_mask(
        cls,
        mask: torch.Tensor,
        block_q: int,
        block_k: int,
        q_len: int,
        k_len: int,
        *,
        pairs: int | None = None,
        query_order: torch.Tensor | None = None,
        key_order: torch.Tensor | None = None,
        key_lengths: torch.Tensor | None = None,
    ) -> BlockLayout:
        """Uniform blocks (the last may be short) from a bool mask [B|1, H|1, ⌈q_len/block_q⌉, ⌈k_len/block_k⌉].

        Raises:
            ValueError: the mask is not bool, or its shape is not the one that the lengths and blocks ask for.
        """
        query_bounds, key_bounds = (
            uniform_bounds(length, block, mask.device) for length, block in ((q_len, block_q), (k_len, block_k))
        )
        layout = cls.from_bounds(
            mask,
            query_bounds,
            key_bounds,
            q_len,
            k_len,
            max_query_block=min(block_q, q_len),
            max_key_block=min(block_k, k_len),
            pairs=pairs,
            query_order=query_order,
            key_order=key_order,
            key_lengths=key_lengths,
        )
        return replace(layout, uniform=True)

    @classmethod
    def from_bounds(
        cls,
        mask: torch.Tensor,
        query_bounds: torch.Tensor,
        key_bounds: torch.Tensor,
        q_len: int,
        k_len: int,
        *,
        max_query_block: int | None = None,
        max_key_block: int | None = None,
        pairs: int | None = None,
        query_order: torch.Tensor | None = None,
        key_order: torch.Tensor | None = None,
        key_lengths: torch.Tensor | None = None,
    ) -> BlockLayout:
        """Blocks of any sizes from their bounds and a bool mask [B|1, H|1, nq, nk].

        Args:
            query_bounds, key_bounds: int32 [nq+1] and [nk+1] for all heads, or [B|1, H|1, nq+1] and [B|1, H|1, nk+1].
            max_query_block, max_key_block: at least the size of the largest block; all of the sequence if not given.
            pairs: at least the number of pairs that `mask` keeps: then nothing waits for the device. None counts them.

        Raises:
            ValueError: shapes or dtypes that do not fit each other.
        """
        query_bounds, key_bounds = (
            bounds_per_head("query_bounds", query_bounds),
            bounds_per_head("key_bounds", key_bounds),
        )
        expected = (query_bounds.shape[-1] - 1, key_bounds.shape[-1] - 1)
        if mask.dtype != torch.bool or mask.ndim != 4 or tuple(mask.shape[2:]) != expected:
            raise ValueError(
                f"the mask is {mask.dtype} {tuple(mask.shape)}; these lengths and blocks need bool [B|1, H|1, "
                f"{expected[0]}, {expected[1]}]"
            )
        for name, order, length in (("query_order", query_order, q_len), ("key_order", key_order, k_len)):
            if order is not None and (order.ndim != 3 or order.shape[-1] != length):
                raise ValueError(f"{name} has shape {tuple(order.shape)}; it must be [B|1, H|1, {length}]")
        indptr, columns = _rows_of(mask, pairs)
        return cls(
            q_len,
            k_len,
            query_bounds,
            key_bounds,
            indptr,
            columns,
            q_len if max_query_block is None else max_query_block,
            k_len if max_key_block is None else max_key_block,
            query_order=query_order,
            key_order=key_order,
            key_lengths=key_lengths,
        )

    @property
    def device(self) -> torch.device:
        return self.columns.device

    @property
    def query_blocks(self) -> int:
        return self.query_bounds.shape[-1] - 1

    @property
    def key_blocks(self) -> int:
        return self.key_bounds.shape[-1] - 1

    def mask(self) -> torch.Tensor:
        """The kept pairs as bool [B|1, H|1, nq, nk]: the inverse of `from_bounds`."""
        batch, heads, _ = self.indptr.shape
        stops = self.indptr[..., 1:].flatten().contiguous()
        pairs = torch.arange(self.columns.numel(), dtype=torch.int32, device=self.device)
        rows = torch.searchsorted(stops, pairs, right=True)
        kept = torch.zeros(stops.numel() + 1, self.key_blocks, dtype=torch.bool, device=self.device)
        kept[rows, self.columns.long()] = True  # what lies behind the last row lands in one more row
        return kept[:-1].view(batch, heads, self.query_blocks, self.key_blocks)

    def token_mask(self, batch: int, heads: int) -> torch.Tensor:
        """Kept and not forbidden, token by token, in the tokens' own order: bool [batch, heads, q_len, k_len].

        This is the meaning of a layout. It is as large as a score matrix, so it is for tests and pictures.
        """
        blocks = self.mask().expand(batch, heads, -1, -1)
        rows, columns = self.query_block_of_place(batch, heads), self.key_block_of_place(batch, heads)
        places = blocks.gather(2, rows[..., None].expand(-1, -1, -1, self.key_blocks))
        tokens = places.gather(3, columns[:, :, None].expand(-1, -1, self.q_len, -1))
        if self.query_order is not None:
            order = self.query_order.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, self.k_len)
            tokens = torch.zeros_like(tokens).scatter(2, order, tokens)
        if self.key_order is not None:
            order = self.key_order.expand(batch, heads, -1)[:, :, None].expand(-1, -1, self.q_len, -1)
            tokens = torch.zeros_like(tokens).scatter(3, order, tokens)
        if self.key_lengths is not None:
            valid = torch.arange(self.k_len, device=self.device) < self.key_lengths[:, None]
            tokens = tokens & valid[:, None, None]
        return tokens

    def query_block_of_place(self, batch: int, heads: int) -> torch.Tensor:
        """int64 [batch, heads, q_len]: the query block that holds each place."""
        return block_of_place(self.query_bounds, self.q_len).expand(batch, heads, -1)

    def key_block_of_place(self, batch: int, heads: int) -> torch.Tensor:
        """int64 [batch, heads, k_len]: the key block that holds each place."""
        return block_of_place(self.key_bounds, self.k_len).expand(batch, heads, -1)

    def density(self) -> float:
        """Kept share of the token pairs, mean over batch entries and heads. Waits for the device."""
        area = self.query_bounds.diff().double()[..., None] * self.key_bounds.diff().double()[:, :, None]
        return float((self.mask() * area).sum(dim=(-1, -2)).mean() / (self.q_len * self.k_len))


def uniform_bounds(length: int, block: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Bounds of blocks of `block` places; the last one may be short. int32 [⌈length/block⌉+1]."""
    if block < 1 or length < 1:
        raise ValueError(f"length {length} and block {block} must both be at least 1")
    return torch.arange(0, -(-length // block) * block + 1, block, dtype=torch.int32, device=device).clamp_(max=length)


def bounds_per_head(name: str, bounds: torch.Tensor) -> torch.Tensor:
    """Block bounds as [B|1, H|1, n+1]. Raises ValueError for what are none."""
    if bounds.dtype != torch.int32 or bounds.ndim not in (1, 3) or bounds.shape[-1] < 2:
        raise ValueError(f"{name} is {bounds.dtype} {tuple(bounds.shape)}; it must be int32 [n+1] or [B|1, H|1, n+1]")
    return bounds if bounds.ndim == 3 else bounds[None, None]


def _rows_of(mask: torch.Tensor, pairs: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`indptr` and `columns` of a mask."""
    batch, heads, rows, columns = mask.shape
    counts = mask.sum(-1, dtype=torch.int32).flatten()
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    first = torch.arange(batch * heads, device=mask.device)[:, None] * rows
    indptr = starts[first + torch.arange(rows + 1, device=mask.device)].view(batch, heads, rows + 1)
    flat = mask.flatten()
    kept = flat.nonzero() if pairs is None else torch.nonzero_static(flat, size=pairs, fill_value=0)
    return indptr, (kept[:, 0] % columns).to(torch.int32)


def block_of_place(bounds: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [B|1, H|1, length]: the block that holds each place; empty blocks hold none."""
    places = torch.arange(length, dtype=torch.int32, device=bounds.device)
    return torch.searchsorted(
        bounds[..., 1:].contiguous(), places.expand(*bounds.shape[:2], -1).contiguous(), right=True
    )
