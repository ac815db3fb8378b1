"""Plans and records as a search leaves them, made up anew each time."""

import numpy as np

from pointillist.accel.plan import Plan, Rule, Stage
from pointillist.accel.schedule import Schedule
from pointillist.search.record import Point, SearchRecord

KINDS = ("pooled", "window", "semantic", "diagonal", "dense", "skip")


def made_up(layers=6, heads=4, boundaries=(1.0, 0.9, 0.55), cells=36, seed=None) -> tuple[Plan, SearchRecord]:
    """A plan with a table for each step bucket but the dense first, and a record that fits it."""
    random = np.random.default_rng(seed)
    tables = [_table(random, layers, heads) for _ in boundaries[1:]]
    stages = tuple(Stage(table, below) for table, below in zip(tables[1:], boundaries[2:], strict=True))
    plan = Plan(
        name="balanced",
        table=tables[0],
        stages=stages,
        tail="pooled",
        schedule=Schedule(dense_above=boundaries[1]),
        min_tokens=1024,
        model=f"wan-{layers}x{heads}x64-95469fac",
        grid=(9, 22, 22),
        hardware="cpu",
        predicted={"speedup": 2.2, "psnr": 30.9},
        measured={"speedup": 2.1, "psnr": 30.2},
    )
    kept = np.array([[[rule.kept for rule in row] for row in table] for table in [tables[0], *tables]])
    shape = (len(boundaries), layers, heads)
    dense = random.uniform(9e-3, 11e-3, layers)
    true_maps, kept_maps = _maps(random, kept[-1], cells)
    record = SearchRecord(
        settings={"model": "embedded", "prompts": 8, "steps": 20, "seed": 0, "grid": [9, 22, 22], "wish": "2×"},
        points=_points(random),
        seconds={"profile": 21.0, "errors": 33.5, "sensitivity": 14.2, "assignment": 0.6, "verification": 26.8,
                 "dense clip": 9.3},
        boundaries=boundaries,
        errors=((1 - kept) * random.uniform(0.02, 0.2, shape)).astype(np.float32),
        sensitivity=random.uniform(0.5, 2, shape[:2]).astype(np.float32),
        dense_seconds=dense.astype(np.float32),
        plan_seconds=(dense * (0.15 + 0.9 * kept.mean(2))).astype(np.float32),
        true_maps=true_maps.astype(np.float16),
        kept_maps=kept_maps.astype(np.float16),
    )  # fmt: skip
    return plan, record


def _table(random, layers, heads):
    def rule():
        kind = random.choice(KINDS, p=(0.4, 0.2, 0.15, 0.1, 0.1, 0.05))
        options = (("order", "gilbert"), ("rule", "mass")) if kind == "pooled" and random.random() < 0.5 else ()
        density = 1.0 if kind == "dense" else float(random.choice((0.05, 0.1, 0.2, 0.3, 0.5)))
        return Rule(str(kind), density, options)

    return tuple(tuple(rule() for _ in range(heads)) for _ in range(layers))


def _points(random):
    speedups = np.sort(random.uniform(1.1, 3.5, 9))
    measured = {1, 4, 7}
    return tuple(
        Point(
            name=f"budget {1 / speedup:.2f}", density=0.5 / speedup, predicted_speedup=float(speedup),
            predicted_psnr=float(40 - 5 * speedup + 0.3 * i), chosen=i == 4,
            measured_speedup=float(speedup * random.uniform(0.93, 1.03)) if i in measured else None,
            measured_psnr=float(39.6 - 5 * speedup + 0.3 * i + random.normal() * 0.4) if i in measured else None,
            measured_ssim=0.95 if i in measured else None,
        )
        for i, speedup in enumerate(speedups)
    )  # fmt: skip


def _maps(random, kept, cells):
    """Attention that falls with the distance in tokens, and again in every frame; what is kept is its highest part."""
    layers, heads = kept.shape
    at = np.arange(cells)
    distance = np.abs(at[:, None] - at[None])
    frame = cells / 9
    reach = random.uniform(0.5, cells / 3, (layers, heads, 1, 1))
    stripes = random.uniform(0, 1.5, (layers, heads, 1, 1))
    scores = -distance / reach + stripes * np.cos(2 * np.pi * distance / frame)
    scores = scores + random.normal(size=(layers, heads, 1, cells)) * 0.5 + random.normal(size=scores.shape) * 0.3
    true_maps = np.exp(scores - scores.max(-1, keepdims=True))
    true_maps /= true_maps.sum(-1, keepdims=True)
    order = np.argsort(np.argsort(-true_maps, -1), -1)
    kept_maps = (order < kept[:, :, None, None] * cells).astype(float)
    return true_maps, kept_maps
