"""Generations that one process and several must make alike. Imported by the processes of `jobs`."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

import pointillist
from conftest import make_pipe, make_transformer
from pointillist.accel.parallel.start import parallelize
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.schedule import Schedule


@dataclass
class Case:
    """One generation of tiny Wan, and how it is split."""

    plan: Plan | str = "none"
    ulysses: int = 2
    ring: int = 1
    heads: int = 4
    frames: int = 9
    size: int = 64
    steps: int = 3
    how: dict = field(default_factory=dict)
    """More arguments of `accelerate`."""


def mixed(*rules: Rule, **changes) -> Plan:
    values = dict(name="mixed", table=(tuple(rules),), block=8, break_even=False, schedule=Schedule(dense_steps=1))
    return Plan(**{**values, **changes})


STATIC = (Rule("tile", 0.5), Rule("window", 0.3), Rule("radial", 0.6), Rule("diagonal", 0.4))
DYNAMIC = (Rule("pooled", 0.3), Rule("tile", 0.5), Rule("pooled", 0.6), Rule("grid", 0.4))

LOOKING = ("semantic", "masses", "vertical_slash", "reorder", "random", "moba", "pyramid", "sla")


def of(pattern: str, **changes) -> Case:
    return Case(Plan.uniform(pattern, 0.4, dense_steps=1, block=8), **changes)


CASES = {
    "dense": Case(),
    "static": Case(mixed(*STATIC)),
    "static with means": Case(mixed(*STATIC, tail="pooled")),
    "static with a residual": Case(mixed(*STATIC, tail="pooled", residual=True)),
    "rescaled": Case(mixed(*STATIC, tail="rescaled")),
    "dynamic": Case(mixed(*DYNAMIC, tail="pooled")),
    "dynamic, choices reused": Case(mixed(*DYNAMIC, reuse_layers=2, reuse_steps=2)),
    "uneven tokens": Case(mixed(*STATIC, tail="pooled"), frames=9, size=80),
    "uneven heads": Case(mixed(*STATIC[:3], tail="pooled"), heads=3),
    "uneven both": Case(mixed(*DYNAMIC[:3], tail="pooled"), heads=3, frames=9, size=80),
    "hoisted": Case(mixed(*STATIC[:3], Rule("tile", 0.2), hoist="tiles")),
    "balanced": Case(mixed(Rule("dense", 1.0), Rule("tile", 0.5), Rule("tile", 0.1), Rule("pooled", 0.2))),
    "skipping": Case(mixed(Rule("skip", 0.1), Rule("tile", 0.5), Rule("window", 0.4), Rule("skip", 0.1))),
    **{name: of(name) for name in LOOKING},
    "cache": Case(mixed(*STATIC), steps=10, how={"cache": "first_block:threshold=0.6"}),
    "cache of outputs": Case(mixed(*STATIC), steps=10, how={"cache": "rate:threshold=0.5,level=output"}),
    "easy cache": Case("none", steps=10, how={"cache": "easy"}),
    "regions": Case(mixed(*STATIC, tail="pooled"), steps=8, how={"regions": "change:share=0.4,every=3"}),
    "regions of dynamic": Case(mixed(*DYNAMIC, tail="pooled"), steps=8, how={"regions": "change:share=0.3,every=3"}),
    "everything": Case(
        mixed(*STATIC, tail="pooled"), steps=10, frames=9, size=80,
        how={"regions": "change:share=0.4,every=3", "cache": "first_block:threshold=0.5"},
    ),
}  # fmt: skip

RING = {
    "ring: dense": Case(ring=2, ulysses=1),
    "ring: static": Case(mixed(*STATIC), ring=2, ulysses=1),
    "ring: static with means": Case(mixed(*STATIC, tail="pooled"), ring=2, ulysses=1),
    "ring: uneven tokens": Case(mixed(*STATIC, tail="pooled"), ring=2, ulysses=1, size=80),
    "ring: hoisted": Case(
        mixed(*STATIC[:3], Rule("tile", 0.2), hoist="tiles"), ring=2, ulysses=1
    ),
    "ring: few pairs": Case(mixed(Rule("diagonal", 0.02), Rule("tile", 0.02), Rule("dense", 1.0), Rule("window", 0.1)),
                            ring=2, ulysses=1),
    "ring: cache": Case(mixed(*STATIC), steps=10, how={"cache": "first_block:threshold=0.6"}, ring=2, ulysses=1),
}  # fmt: skip
FOUR = {
    "four: static": Case(mixed(*STATIC, tail="pooled"), ulysses=4),
    "four: dynamic": Case(mixed(*DYNAMIC, tail="pooled"), ulysses=4),
    "four: uneven": Case(
        mixed(*DYNAMIC, *STATIC[:3], tail="pooled"), ulysses=4, heads=7, size=80,
        how={"regions": "change:share=0.4,every=3", "cache": "first_block:threshold=0.5"}, steps=8,
    ),
    "four: balanced": Case(
        mixed(*(Rule("tile", share) for share in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1))), ulysses=4, heads=8
    ),
}  # fmt: skip
FOUR_IN_RINGS = {
    "ring of four": Case(mixed(*STATIC, tail="pooled"), ulysses=1, ring=4),
    "two by two: dense": Case(ulysses=2, ring=2),
    "two by two: static": Case(mixed(*STATIC), ulysses=2, ring=2),
    "two by two: means": Case(
        mixed(*STATIC[::-1], tail="pooled"), ulysses=2, ring=2, steps=10, how={"cache": "first_block:threshold=0.5"}
    ),
}  # fmt: skip
REFUSED = {
    "ring: dynamic": (Case(mixed(*DYNAMIC), ring=2, ulysses=1), "look at queries and keys .grid, pooled. need all"),
    "ring: rescaled": (Case(mixed(*STATIC, tail="rescaled"), ring=2, ulysses=1), "tail 'rescaled' is of whole rows"),
    "ring: regions": (
        Case(mixed(*STATIC), ring=2, ulysses=1, how={"regions": "easy"}), "regions keep the keys of all tokens"
    ),
    "heads": (Case(heads=1), "1 heads cannot be spread over 2"),
    "degrees": (Case(ulysses=4), "is 4, and this job has 2 processes"),
}  # fmt: skip
ALL = CASES | RING | FOUR | FOUR_IN_RINGS | {name: case for name, (case, _) in REFUSED.items()}


def run_case(name: str):
    """The latents and the report's figures of one case, split if there are several processes."""
    case = ALL[name]
    torch.manual_seed(7)
    transformer = make_transformer(num_attention_heads=case.heads, layers=3)
    texts = torch.randn(2, 1, 12, 32)
    pipe = make_pipe(transformer=transformer)
    if dist.is_initialized():
        parallelize(pipe, case.ulysses, case.ring)
    with pointillist.accelerate(pipe, case.plan, **{"cache": "none", "regions": "none"} | case.how) as handle:
        out = pipe(
            prompt_embeds=texts[0:1][0], negative_prompt_embeds=texts[1:2][0], height=case.size, width=case.size,
            num_frames=case.frames, num_inference_steps=case.steps, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5), output_type="latent",
        ).frames  # fmt: skip
        report = handle.report()
    return out, report.steps, report.density
