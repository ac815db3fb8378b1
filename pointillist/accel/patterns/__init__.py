"""Patterns: rules for which key blocks a query block sees. One file each.

A pattern ranks the key tiles of every query tile (`scores`) and keeps the first `keep` of them. Densities
count video × video pairs only: segments of other kinds change no parameter, their pairs are always kept.
A `static` pattern's scores depend on the tiling alone.
"""

from pointillist.accel.patterns.dense import Dense
from pointillist.accel.patterns.pooled import Pooled
from pointillist.accel.patterns.window import Window

Pattern = Dense | Window | Pooled
PATTERNS: dict[str, type[Dense] | type[Window] | type[Pooled]] = {
    "dense": Dense,
    "window": Window,
    "pooled": Pooled,
}

__all__ = ["PATTERNS", "Dense", "Pattern", "Pooled", "Window"]
