"""Drawing a pattern: `python -m pointillist.accel.patterns.window --density 0.2 --output window.png`."""

import argparse
from pathlib import Path

import torch

from pointillist.accel.patterns.pattern import Call, Pattern
from pointillist.accel.tiles import Grid, whole_video

KEPT, DROPPED, OWN, SEEN, FAINT = "#20304f", "#f4f1ea", "#d1495b", "#2e86ab", "#dfe3e8"


def draw(cls: type[Pattern], arguments: list[str] | None = None) -> None:
    """Write a picture of the pattern: which token pairs it keeps, frames marked, and what one query token sees.

    q and k are made with local structure, so that patterns which look at them find something.
    """
    parser = argparse.ArgumentParser(description=f"Draw the pattern {cls.name()}.")
    parser.add_argument("--grid", type=int, nargs=3, default=(9, 22, 22), metavar=("T", "H", "W"))
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the pattern")
    parser.add_argument("--output", "--out", type=Path, default=Path(f"{cls.name()}.png"))
    args = parser.parse_args(arguments)
    grid = (args.grid[0], args.grid[1], args.grid[2])
    options = cls.options_from(args.option)
    pattern = cls.at_density(args.density, grid, whole_video(grid), args.block, **options)
    kept, density = kept_tokens(pattern, grid, args.block)
    _picture(kept, grid, f"{cls.name()}, density {density:.2f}", args.output)
    print(f"{args.output}: density {density:.3f}, {pattern}")


def kept_tokens(pattern: Pattern, grid: Grid, block: int) -> tuple[torch.Tensor, float]:
    """bool [S, S], which token sees which, and the density, for made-up q and k of one head."""
    from pointillist.accel.layouts import Group, lay_out, select

    axes = (torch.linspace(-1, 1, length) for length in grid)
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    generator = torch.Generator().manual_seed(0)
    waves = 4 * place @ torch.randn(3, 32, generator=generator)
    q = torch.cat([waves.cos(), waves.sin()], -1)[None, None]
    q = q + 0.3 * torch.randn(q.shape, generator=generator)
    call = Call(q, q, q, 0.4, grid, whole_video(grid), block)
    pattern.prepare(call, q)
    laid = lay_out([(Group(pattern), select(Group(pattern), call))], call)
    return laid.layout.token_mask(1, 1)[0, 0], float(laid.density)


def _picture(kept: torch.Tensor, grid: Grid, title: str, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    frames, height, width = grid
    query = (frames // 2 * height + height // 2) * width + width // 3
    columns = min(frames, 3)
    rows = -(-frames // columns)
    figure = plt.figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, wspace=0.02)  # type: ignore[misc]
    axes = left.subplots()
    axes.imshow(kept.numpy(), cmap=ListedColormap([DROPPED, KEPT]), interpolation="nearest", vmin=0, vmax=1)
    for frame in range(1, frames):
        for line in (axes.axhline, axes.axvline):
            line(frame * height * width - 0.5, color="#b0a99a", linewidth=0.4)
    axes.axhline(query, color=OWN, linewidth=0.8)
    axes.set(title=title, xlabel="key tokens, frame by frame", ylabel="query tokens", xticks=[], yticks=[])
    right.suptitle("what the marked query sees, frame by frame", fontsize=10)
    seen = kept[query].view(grid).numpy()
    for frame, cell in enumerate(right.subplots(rows, columns, squeeze=False).flat):
        cell.axis("off")
        if frame < frames:
            cell.imshow(seen[frame], cmap=ListedColormap([FAINT, SEEN]), interpolation="nearest", vmin=0, vmax=1)
            cell.set_title(f"frame {frame}", fontsize=7, pad=2)
        if frame == frames // 2:
            cell.plot(width // 3, height // 2, "o", color=OWN, markersize=4)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    plt.close(figure)
