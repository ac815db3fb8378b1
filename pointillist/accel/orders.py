"""Orders of the video's tokens: the six axis orders, and curves that keep neighbours together.

An axis order is named by its letters, slowest axis first: `thw` is the order of the sequence itself, frame by frame,
`hwt` puts the same place of all frames together (Sparse VideoGen's token-major order; PAROAttention uses all six).
"""

import itertools
from functools import lru_cache

import torch

from pointillist.accel.tiles import Grid

AXES = ("thw", "twh", "hwt", "htw", "wht", "wth")
CURVES = ("morton", "hilbert", "gilbert")
ORDERS = (*AXES, *CURVES)


@lru_cache(maxsize=64)
def order_of(name: str, grid: Grid) -> torch.Tensor:
    """int64 [T·H·W] on the CPU: the token at each place of the order `name`, one of `ORDERS`."""
    if name in AXES:
        axes = ["thw".index(axis) for axis in name]
        return torch.arange(grid[0] * grid[1] * grid[2]).view(grid).permute(axes).flatten().contiguous()
    if name not in CURVES:
        raise ValueError(f"order {name!r} is unknown; allowed are {', '.join(ORDERS)}")
    if name == "gilbert":
        t, h, w = torch.tensor(_gilbert(grid)).view(-1, 3).unbind(1)
        return (t * grid[1] + h) * grid[2] + w
    bits = max(1, (max(grid) - 1).bit_length())
    place = places_of(grid)
    keys = _hilbert_keys(place, bits) if name == "hilbert" else _interleave(place, bits)
    return keys.argsort(stable=True)


def places_of(grid: Grid) -> torch.Tensor:
    """int64 [T·H·W, 3]: (t, h, w) of every token, in the sequence's own order."""
    return torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, 3)


def _interleave(place: torch.Tensor, bits: int) -> torch.Tensor:
    """The bits of the three coordinates in turn, highest first: the Morton key, int64 [n]."""
    key = torch.zeros(len(place), dtype=torch.int64)
    for bit, axis in itertools.product(reversed(range(bits)), range(3)):
        key = key * 2 + (place[:, axis] >> bit & 1)
    return key


def _hilbert_keys(place: torch.Tensor, bits: int) -> torch.Tensor:
    """Place on the Hilbert curve of the enclosing cube (Skilling, "Programming the Hilbert curve", 2004)."""
    x = [axis.clone() for axis in place.unbind(1)]
    for level in reversed(range(1, bits)):
        bit, low = 1 << level, (1 << level) - 1
        for axis in range(3):
            turned = (x[axis] & bit) != 0
            swap = torch.where(turned, 0, (x[0] ^ x[axis]) & low)
            x[0] = torch.where(turned, x[0] ^ low, x[0] ^ swap)
            x[axis] = x[axis] ^ swap
    for axis in (1, 2):
        x[axis] = x[axis] ^ x[axis - 1]
    flip = torch.zeros_like(x[0])
    for level in range(1, bits):
        flip = flip ^ torch.where((x[2] & (1 << level)) != 0, (1 << level) - 1, 0)
    return _interleave(torch.stack([axis ^ flip for axis in x], 1), bits)


Vector = tuple[int, int, int]


def _gilbert(grid: Grid) -> list[Vector]:
    """The cells of a box of any size in the order of a generalised Hilbert curve: each is a neighbour of the one before
    (but for single diagonal steps where sizes are odd). The longest axis leads."""
    longest, second, third = sorted(range(3), key=lambda axis: -grid[axis])

    def along(axis: int) -> Vector:
        return tuple(grid[axis] if other == axis else 0 for other in range(3))  # type: ignore[return-value]

    return list(_fill((0, 0, 0), along(longest), along(second), along(third)))


def _fill(start: Vector, a: Vector, b: Vector, c: Vector) -> itertools.chain | list[Vector]:
    """Cells of the box from `start` spanned by a, b, c; the curve enters at `start` and leaves at the end of a."""
    (length_a, step_a), (length_b, step_b), (length_c, step_c) = (_length_and_step(v) for v in (a, b, c))
    for length, step, others in (
        (length_a, step_a, (length_b, length_c)),
        (length_b, step_b, (length_a, length_c)),
        (length_c, step_c, (length_a, length_b)),
    ):
        if others == (1, 1):
            return [_add(start, step, times) for times in range(length)]

    half_a, half_b, half_c = (_half(v, length) for v, length in ((a, length_a), (b, length_b), (c, length_c)))
    last_a, last_b, last_c = (_add((0, 0, 0), v, -1) for v in (step_a, step_b, step_c))
    rest_a, rest_b, rest_c = (_minus(v, half) for v, half in ((a, half_a), (b, half_b), (c, half_c)))
    end_a = _sum(start, a, last_a)

    def back(v: Vector) -> Vector:
        return (-v[0], -v[1], -v[2])

    if 2 * length_a > 3 * length_b and 2 * length_a > 3 * length_c:  # long: two boxes one after the other
        parts = [(start, half_a, b, c), (_sum(start, half_a), rest_a, b, c)]
    elif 3 * length_b > 4 * length_c:  # flat: a U in the plane of a and b
        parts = [
            (start, half_b, c, half_a),
            (_sum(start, half_b), a, rest_b, c),
            (_sum(end_a, half_b, last_b), back(half_b), c, back(rest_a)),
        ]
    elif 3 * length_c > 4 * length_b:  # a U in the plane of a and c
        parts = [
            (start, half_c, half_a, b),
            (_sum(start, half_c), a, b, rest_c),
            (_sum(end_a, half_c, last_c), back(half_c), back(rest_a), b),
        ]
    else:  # near-cubic: five boxes
        parts = [
            (start, half_b, half_c, half_a),
            (_sum(start, half_b), c, half_a, rest_b),
            (_sum(start, half_b, last_b, c, last_c), a, back(half_b), back(rest_c)),
            (_sum(end_a, half_b, c, last_c), back(c), back(rest_a), rest_b),
            (_sum(end_a, half_b, last_b), back(half_b), half_c, back(rest_a)),
        ]
    return itertools.chain.from_iterable(_fill(*part) for part in parts)


def _length_and_step(v: Vector) -> tuple[int, Vector]:
    length = abs(sum(v))
    return length, tuple((n > 0) - (n < 0) for n in v)  # type: ignore[return-value]


def _half(v: Vector, length: int) -> Vector:
    """Half of v, rounded to an even length if v is longer than two: an even box leaves where the next one begins."""
    half = length // 2
    half += half % 2 if length > 2 else 0
    return tuple(n * half // length for n in v)  # type: ignore[return-value]


def _add(start: Vector, step: Vector, times: int) -> Vector:
    return (start[0] + times * step[0], start[1] + times * step[1], start[2] + times * step[2])


def _sum(*vectors: Vector) -> Vector:
    return tuple(sum(axis) for axis in zip(*vectors, strict=True))  # type: ignore[return-value]


def _minus(a: Vector, b: Vector) -> Vector:
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])
