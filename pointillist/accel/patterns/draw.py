"""Drawing a pattern: `python -m pointillist.accel.patterns.window --density 0.2 --output window.png`."""

import argparse
from pathlib import Path

import torch

from pointillist.accel.patterns.dense import Dense
from pointillist.accel.patterns.pooled import Pooled
from pointillist.accel.patterns.window import Window
from pointillist.accel.tiles import tiling_of, whole_video

CELL = 8  # pixels per pair of tiles


def draw(pattern: type[Dense] | type[Pooled] | type[Window], arguments: list[str] | None = None) -> None:
    """Write which key tiles (columns) each query tile (row) keeps, for q and k with local structure."""
    import imageio.v3 as iio

    from pointillist.accel.layouts import layout_of

    name = pattern.__name__.lower()
    parser = argparse.ArgumentParser(description=f"Draw the pattern {name}: kept pairs of tiles are white.")
    parser.add_argument("--grid", type=int, nargs=3, default=(9, 22, 22), metavar=("T", "H", "W"))
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path(f"{name}.png"))
    args = parser.parse_args(arguments)
    grid = (args.grid[0], args.grid[1], args.grid[2])
    segments = whole_video(grid)
    axes = (torch.linspace(-1, 1, length) for length in grid)
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    waves = 4 * place @ torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    q = torch.cat([waves.cos(), waves.sin()], -1)[None, :, None]
    tiling = tiling_of(grid, segments, args.block, q.device)
    layout, density = layout_of((pattern.at_density(args.density, grid, segments, args.block),), q, q, tiling, 0.4)
    cell = torch.ones(CELL, CELL, dtype=torch.uint8)
    iio.imwrite(args.output, torch.kron(layout.mask()[0, 0].to(torch.uint8) * 255, cell).numpy())
    print(f"{args.output}: {tiling.tiles} tiles of up to {tiling.largest} tokens, density {float(density):.3f}")
