"""What one attention call of a site does, counted: operators, bytes, products, exponentials, rows.

Choosing pairs, laying them out and the tail are plain torch. They run once, on made-up q and k of few heads, while
every operator that torch dispatches is counted: no pattern has a formula of its own. Attention itself does not run
then; its work follows from the layout that it is handed, in closed form (`attention_work`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pointillist.accel.blocks import Blocks, blocks_in
from pointillist.accel.plan import Rule
from pointillist.accel.tiles import Grid
from pointillist.kernels.layout import BlockLayout
from pointillist.search.site_call import SiteCall, SiteShape, Way

VERSION = 2
"""Changes with what is counted: profiles that were fitted to other counts do not serve."""
TILES = {"cpu": (1, 1), "triton": (128, 64)}
"""Queries and keys that the kernels compute at least at a time."""
LONGEST = 8192
"""Longer sequences are counted at the two lengths below, and continued."""
SHORTER = (2500, 6000)
FEW = 1000
"""Tokens that are enough to see in which order a pattern takes them."""


@dataclass(frozen=True)
class Work:
    """How much of everything that takes time. Its time is the sum of each × what one of it takes."""

    operators: float = 0.0
    """Operators: launches on a GPU."""
    bytes: float = 0.0
    """Read and written beside what attention's inner loop reads."""
    gathered: float = 0.0
    """Numbers that are each moved by an index of their own, as the permutation of single heads does."""
    flops: float = 0.0
    """Of matrix products beside attention."""
    sorted: float = 0.0
    """n·log₂n of what is sorted."""
    rows: float = 0.0
    """Query blocks of heads in sparse attention."""
    dense_flops: float = 0.0
    """Of the products of dense attention, 4·D for a pair of tokens."""
    sparse_flops: float = 0.0
    exps: float = 0.0
    """Scores that go through a softmax, dense or sparse."""
    biased: float = 0.0
    """Of them, those to which a bias is added."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(value * factor for value in self.values()))

    def values(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return tuple(getattr(self, each.name) for each in fields(self))


PAIRS = ("sparse_flops", "exps")
PARTNERS = {"tiles": Rule("window", 0.1), "thw": Rule("diagonal", 0.1)}
"""Order of blocks → a static pattern in it, which costs nothing to choose: it stands for the other rules of a site."""
JOINING = 5
"""Operators that put one more group's pairs into the layout."""


@dataclass(frozen=True)
class RuleWork:
    """What a rule adds to a site's call."""

    head: Work
    """One head of one batch entry: choosing its pairs, its part of the layout, the permutation, tail and attention;
    without operators, which do not grow with heads or batch."""
    choosing: float
    """Operators that choose the pairs of all heads of the rule together."""
    laying: float
    """Operators for the layout, the tail and attention: once for a site, as far as its rules are alike."""


def dense_work(shape: SiteShape, dtype: torch.dtype) -> Work:
    """One dense call."""
    heads = shape.batch * shape.heads
    pairs = heads * shape.tokens**2
    moved = 4 * heads * shape.tokens * shape.head_dim * dtype.itemsize
    return Work(operators=1, bytes=moved, dense_flops=4 * shape.head_dim * pairs, exps=pairs)


def site_work(rules: tuple[Rule, ...], shape: SiteShape, way: Way) -> dict[Rule, RuleWork]:
    """What every rule of a site adds; heads whose rules order tokens alike are permuted at once, others singly."""
    different = dict.fromkeys(rules)
    if len(different) == 1:
        return {rule: rule_work(rule, shape.grid, shape.head_dim, way) for rule in different}
    orders = {order_of(rule, shape.grid, shape.head_dim, way) for rule in different}
    alike = orders.pop() if len(orders) == 1 else None
    return {
        rule: rule_work(rule, shape.grid, shape.head_dim, way, beside(rule, alike, shape, way)) for rule in different
    }


def beside(rule: Rule, order: str | None, shape: SiteShape, way: Way) -> Rule:
    """A partner that orders tokens as all rules do, or, if they differ (None), in another way than `rule`."""
    if order in PARTNERS:
        return PARTNERS[order]
    return PARTNERS["thw" if order_of(rule, shape.grid, shape.head_dim, way) == "tiles" else "tiles"]


@lru_cache(maxsize=4096)
def order_of(rule: Rule, grid: Grid, head_dim: int, way: Way) -> str | None:
    """The name of the order of blocks in which all heads of `rule` see the video; None if each has its own."""
    return SiteCall((rule,), SiteShape(shortened(grid, FEW), 1, 1, head_dim), way).order()


@lru_cache(maxsize=4096)
def rule_work(rule: Rule, grid: Grid, head_dim: int, way: Way, partner: Rule | None = None) -> RuleWork:
    """What `rule` adds to a call of a site, all of whose heads have it, or one more has another, `partner`.

    Counted with one head and with three; the difference is what heads cost. Sequences above `LONGEST` are counted at
    two shorter lengths: what grows with the tokens and what grows with their square follow from these, the pairs from
    the longer one, whose density is nearer to the wished one.
    """
    if math.prod(grid) <= LONGEST:
        return _counted_at(rule, grid, head_dim, way, partner)
    short, long = (shortened(grid, tokens) for tokens in SHORTER)
    less, more = (_counted_at(rule, each, head_dim, way, partner) for each in (short, long))
    n, m, wanted = math.prod(short), math.prod(long), math.prod(grid)
    at_both = zip(less.head.values(), more.head.values(), strict=True)
    head = Work(*(_continued(n, at_n, m, at_m, wanted) for at_n, at_m in at_both))
    order, longer = order_of(rule, grid, head_dim, way), (wanted / m) ** 2
    if order is not None:  # blocks do not fill tiles alike at all lengths, and theirs are known
        longer *= _padded(order, grid, way) / _padded(order, long, way)
        head = replace(head, rows=float(_blocks(order, grid, way).count))
    pairs = {name: getattr(more.head, name) * longer for name in PAIRS}  # a density is the same at all lengths
    return replace(more, head=replace(head, **pairs))


@lru_cache(maxsize=4096)
def prepare_work(rule: Rule, grid: Grid, head_dim: int, way: Way) -> Work:
    """What one head of `rule` does at the last dense step to learn from it; taken to grow with the tokens' square."""
    here = grid if math.prod(grid) <= LONGEST else shortened(grid, SHORTER[1])
    call, counter = SiteCall((rule,), SiteShape(here, 1, 1, head_dim), way), Counter(way.backend, True)
    with torch.inference_mode(False), torch.no_grad():
        call.prepare(counter)
    return replace(counter.work * (math.prod(grid) / math.prod(here)) ** 2, operators=counter.work.operators)


def _padded(order: str, grid: Grid, way: Way) -> float:
    """Pairs that are computed for each pair of tokens, blocks in this order being cut into whole tiles."""
    sizes = _blocks(order, grid, way).sizes
    return math.prod(float((sizes / tile).ceil().sum() * tile / sizes.sum()) for tile in TILES[way.backend])


def _blocks(order: str, grid: Grid, way: Way) -> Blocks:
    return blocks_in(order, grid, way.block, torch.device("cpu"))


def _continued(n: int, at_n: float, m: int, at_m: float, wanted: int) -> float:
    """a·N + b·N² through two points, at `wanted`; neither a nor b below 0."""
    b = (at_m / m - at_n / n) / (m - n)
    a = at_n / n - b * n
    if b < 0:
        return at_m / m * wanted
    if a < 0:
        return at_m / m**2 * wanted**2
    return a * wanted + b * wanted**2


def shortened(grid: Grid, tokens: int) -> Grid:
    """A grid of about so many tokens and the same proportions."""
    ratio = (tokens / math.prod(grid)) ** (1 / 3)
    frames = max(1, round(grid[0] * ratio))
    ratio = (tokens / frames / (grid[1] * grid[2])) ** 0.5
    return frames, max(1, round(grid[1] * ratio)), max(1, round(grid[2] * ratio))


def _counted_at(rule: Rule, grid: Grid, head_dim: int, way: Way, partner: Rule | None) -> RuleWork:
    few, many = 1, 3
    others = () if partner is None else (partner,)
    (choosing, laying), (choosing_many, laying_many) = (
        counted((rule,) * heads + others, SiteShape(grid, 1, heads + len(others), head_dim), way)
        for heads in (few, many)
    )
    at_both = zip((choosing + laying).values(), (choosing_many + laying_many).values(), strict=True)
    head = Work(*(max(0.0, (more - less) / (many - few)) for less, more in at_both))
    return RuleWork(replace(head, operators=0.0), choosing.operators, laying.operators)


def counted(rules: Sequence[Rule], shape: SiteShape, way: Way) -> tuple[Work, Work]:
    """What a call with these rules of its heads does to choose the pairs, and then: the layout, the tail, attention."""
    call = SiteCall(rules, shape, way)
    call()  # what is made once is made now, and the first call of a generation is not the usual one
    choosing, laying = Counter(way.backend), Counter(way.backend)
    with torch.inference_mode(False), torch.no_grad():
        call(choosing, laying)
    return choosing.work, laying.work


FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "lift_fresh",
    "detach",
    "_unsafe_view",
}
"""Operators that move nothing, beside views."""
GATHERS = {"gather", "index_select", "index"}
"""They read only what they take."""
SCATTERS = {"scatter_", "index_copy_", "index_put_", "scatter_add_", "index_add_"}
"""They touch only what they place."""
BY_NUMBER = {"gather", "scatter_", "scatter_add_"}
"""Every number has an index of its own; the others of these two move slices."""
EXPONENTIALS = {"exp", "exp_", "_softmax"}
SORTS = {"sort", "topk", "argsort", "kthvalue"}


class Counter(TorchDispatchMode):
    """Counts what torch dispatches while it is entered; attention is counted from its layout and does not run."""

    def __init__(self, backend: str, learning: bool = False) -> None:
        """`learning`: exponentials of whole attention matrices are taken outside of attention, and count."""
        super().__init__()
        self.work = Work()
        self._backend, self._learning = backend, learning

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.pointillist.attention.default:
            self.work += attention_work(self._backend, *args, **kwargs)
            return torch.zeros_like(args[0]), torch.zeros(args[0].shape[:3])
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in FREE:
            self.work += _operator_work(name, func, args, kwargs, out)
        if self._learning and name in EXPONENTIALS:
            self.work += Work(exps=out.numel())
        return out


def _operator_work(name: str, func: Any, args: tuple, kwargs: dict, out: Any) -> Work:
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    flops_of = flop_registry.get(func.overloadpacket)
    flops = flops_of(*args, **kwargs, out_val=out) if flops_of else 0
    if name in GATHERS:
        moved = outputs + outputs + inputs[1:]
    elif name in SCATTERS:
        moved = inputs[1:] + inputs[-1:]
    else:
        moved = inputs + outputs
    index = next((x for x in inputs if x.dtype == torch.int64), None)
    return Work(
        operators=1,
        bytes=sum(map(_bytes, moved)),
        gathered=index.numel() if name in BY_NUMBER and index is not None else 0,
        flops=flops,
        sorted=inputs[0].numel() * math.log2(max(2, inputs[0].shape[-1])) if name in SORTS else 0,
    )


def _bytes(x: torch.Tensor) -> int:
    """What x occupies; what is only repeated counts once."""
    return min(x.numel() * x.itemsize, x.untyped_storage().nbytes())


def attention_work(
    backend: str,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    query_bounds: torch.Tensor, key_bounds: torch.Tensor, indptr: torch.Tensor, columns: torch.Tensor,
    max_query_block: int, max_key_block: int, uniform: bool,
    query_order: torch.Tensor | None, key_order: torch.Tensor | None, key_lengths: torch.Tensor | None,
    mean_k: torch.Tensor | None, mean_v: torch.Tensor | None, log_counts: torch.Tensor | None,
    pairs: torch.Tensor | None, *rest: Any,
) -> Work:  # fmt: skip
    """One call of sparse attention; the arguments are those of the operator `pointillist::attention`."""
    (batch, heads, q_len, head_dim), k_len = q.shape, k.shape[2]
    layout = BlockLayout(
        q_len, k_len, query_bounds, key_bounds, indptr, columns, max_query_block, max_key_block, uniform
    )
    tile_q, tile_k = TILES[backend]
    queries, keys = (bounds.diff().double() for bounds in (query_bounds, key_bounds))
    queries, keys = (x.div(tile).ceil() * tile for x, tile in ((queries, tile_q), (keys, tile_k)))
    seen = (layout.mask().double() @ keys[..., None])[..., 0]
    means = torch.zeros(())
    if pairs is not None:  # the kernel in Triton walks all means and hides those that a row does not see
        means = pairs.double().sum(-1) if backend == "cpu" else torch.full((), float(pairs.shape[-1]))
    scores = ((seen + means) * queries).expand(batch, heads, -1)
    places = batch * heads * q_len
    orders = [(order, 2 * head_dim) for order in (query_order, key_order) if order is not None and backend != "cpu"]
    moved = sum(numbers for _, numbers in orders) * places
    by_number = sum(numbers for order, numbers in orders if order.shape[:2] != (1, 1)) * places
    packed = 2 * batch * heads * k_len * head_dim if backend == "cpu" else 0  # reading in the order that is asked for
    total = float(scores.sum())
    return Work(
        operators=1 + 3 * (query_order is not None) + 2 * (key_order is not None),
        bytes=(4 * places * head_dim + 2 * moved + packed) * q.itemsize,
        gathered=by_number,
        rows=float((scores > 0).sum()),
        sparse_flops=4 * head_dim * total,
        exps=total,
        biased=float((means * queries).expand(batch, heads, -1).sum()),
    )
