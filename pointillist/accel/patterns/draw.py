"""Drawing a pattern: `python -m pointillist.accel.patterns.window --density 0.2 --output window.png`."""

import argparse
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import torch

from pointillist.accel.tiles import tiles_of

CELL = 8  # pixels per pair of tiles


def draw(pattern: Any) -> None:
    """Write the mask of `pattern` on a grid, for random q and k with local structure, as a PNG: kept is white."""
    parser = argparse.ArgumentParser(description=f"Draw the pattern {pattern.__name__.lower()}.")
    parser.add_argument("--grid", type=int, nargs=3, default=(9, 22, 22), metavar=("T", "H", "W"))
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path(f"{pattern.__name__.lower()}.png"))
    args = parser.parse_args()
    tiles = tiles_of(tuple(args.grid), args.block)
    token = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in args.grid), indexing="ij"), -1).view(-1, 3)
    near = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    q = torch.cat([torch.cos(4 * token @ near), torch.sin(4 * token @ near)], -1)[tiles.order[0, 0]][None, None]
    mask = pattern.at_density(args.density, tiles).mask(q, 3 * q, tiles)[0, 0]
    pixels = mask.to(torch.uint8).mul(255).repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
    iio.imwrite(args.output, pixels.numpy())
    print(f"{args.output}: {tiles.count} tiles of up to {tiles.largest} tokens, density {mask.float().mean():.3f}")
