"""How many key tiles a density keeps."""

from pointillist.accel.tiles import Grid, tile_count


def tiles_kept(density: float, grid: Grid, block: int) -> int:
    """The whole number of key tiles, at least 1, whose share of all tiles is nearest to `density`."""
    tiles = tile_count(grid, block)
    return min(tiles, max(1, round(density * tiles)))
