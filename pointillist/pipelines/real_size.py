"""A model at its true size with random weights: what one denoising step takes, dense and accelerated.

The time of static patterns, of choosing and of everything else does not depend on the values of weights. On a GPU the
transformer is built and timed. Anywhere, its operations are counted on the `meta` device, and the cost model of a
machine says what they would take there: an estimate, and labelled so.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pointillist.accel.accelerate import Acceleration, accelerate
from pointillist.accel.choose_plan import choose_plan
from pointillist.accel.conflicts import targets_of
from pointillist.accel.models import family_of
from pointillist.accel.models.family import Family
from pointillist.accel.plan import Plan
from pointillist.hardware.profile import HardwareProfile
from pointillist.search.cost_model import CostModel
from pointillist.search.site_call import SiteShape

FILE = Path(__file__).with_name("real_sizes.json")
LAYER_COUNTS = ("num_layers", "num_single_layers")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class RealSize:
    """A model as it is run: configuration, inputs of one forward pass, and how many of those make a clip."""

    name: str
    kind: str
    """The transformer's class in Diffusers."""
    config: dict[str, Any]
    inputs: dict[str, Any]
    text: int
    """Tokens beside the video in self-attention."""
    steps: int
    shift: float
    passes: int
    """Forward passes of a step."""
    size: str
    source: str

    @classmethod
    def named(cls, name: str) -> "RealSize":
        """Raises ValueError with the known names."""
        known = json.loads(FILE.read_text(encoding="utf-8"))
        if name not in known:
            raise ValueError(f"the model {name!r:.80} is unknown; allowed are {', '.join(known)}")
        values = known[name]
        return cls(name, values.pop("class"), **values)

    def layers(self) -> int:
        return sum(self.config.get(name, 0) for name in LAYER_COUNTS)

    def transformer(self, device: torch.device, dtype: torch.dtype, layers: int = 0) -> Any:
        """With random weights; of `layers` layers of each kind if that is not 0."""
        import diffusers

        config = dict(self.config)
        for name in LAYER_COUNTS:
            if layers and name in config:
                config[name] = min(layers, config[name])
        kind = getattr(diffusers, self.kind)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return kind(**config).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(before)

    def arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Of a forward pass, but for the timestep."""
        return {name: _input(each, device, dtype) for name, each in self.inputs.items()}


def _input(each: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(each, list):
        return torch.randn(each, device=device, dtype=dtype)
    (kind, value), *rest = each.items()
    if kind == "value":
        return [[tuple(shape) for shape in entry] for entry in value] if isinstance(value, list) else value
    if kind == "ids":
        rows, columns = value
        place = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
        return place.to(device, dtype)
    if kind == "tables":
        return torch.randn(value, device=device), torch.randn(value, device=device)
    filled = rest[0][1] if kind == "filled" else float(kind == "ones")
    return torch.full(value, filled, device=device, dtype=dtype if kind == "filled" else None)


def counted(model: RealSize) -> dict[str, Any]:
    """Operations of a forward pass, and parameters, without memory for either."""
    from torch.utils.flop_counter import FlopCounterMode

    device, dtype = torch.device("meta"), torch.bfloat16
    transformer = model.transformer(device, dtype)
    family, shape = _family(transformer), _shape(model, transformer)
    arguments = model.arguments(device, dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(timestep=torch.ones(arguments["hidden_states"].shape[0], device=device), **arguments)
    sites = len(family.sites(transformer))
    tokens = shape.tokens + model.text
    return {
        "model": model.name, "size": model.size, "grid": list(shape.grid), "tokens": tokens, "sites": sites,
        "heads": shape.heads, "head_dim": shape.head_dim, "batch": shape.batch,
        "parameters": sum(each.numel() for each in transformer.parameters()),
        "tflop": counter.get_total_flops() / 1e12,
        "attention_tflop": sites * shape.batch * shape.heads * 4 * tokens**2 * shape.head_dim / 1e12,
    }  # fmt: skip


def _family(transformer: Any) -> Family:
    family = family_of(transformer)
    assert family is not None, "the file names supported models"
    return family


def _shape(model: RealSize, transformer: Any) -> SiteShape:
    family = _family(transformer)
    latents = model.arguments(torch.device("cpu"), torch.float32)
    batch, heads = latents["hidden_states"].shape[0], family.heads(transformer)
    return SiteShape(family.tokens(transformer, latents).grid, batch, heads, transformer.config.attention_head_dim)


def estimated(model: RealSize, plan: Plan | str, profile: HardwareProfile, dtype: torch.dtype) -> dict[str, Any]:
    """What a step takes on a machine, by its cost model. Products and attention are counted; what moves memory between
    them is not, so a real step takes longer and gains less."""
    count = counted(model)
    transformer = model.transformer(torch.device("meta"), dtype)
    shape = _shape(model, transformer)
    chosen = _chosen(plan, transformer)
    costs = CostModel(profile, dtype)
    longer = (count["tokens"] / shape.tokens) ** 2  # text is exact: its rows and columns are added at dense cost
    name = str(dtype).removeprefix("torch.")
    rate = profile.matmul_tflops[name] * profile.dense_efficiency
    other = (count["tflop"] - count["attention_tflop"]) / rate
    dense_site = costs.dense(shape) * longer
    text = costs.dense(shape) * (longer - 1)
    sites = range(count["sites"])

    def sparse_site(layer: int) -> float:
        rules = chosen.carried(chosen.rules(layer, 0.0, "transformer"), shape.tokens)
        if shape.tokens + model.text < chosen.min_tokens:
            return dense_site
        made = costs.site(
            rules if len(rules) in (1, shape.heads) else rules[:1], shape, tail=chosen.tail, residual=chosen.residual,
            block=chosen.block, hoist=chosen.hoist,
        )  # fmt: skip
        return min(dense_site, made + text)

    dense, sparse = count["sites"] * dense_site, sum(map(sparse_site, sites))
    return {
        **count, "plan": chosen.name, "hardware": profile.name, "dtype": name, "estimate": True,
        **_bill(model, chosen, other + dense, other + sparse, dense, sparse, count),
    }  # fmt: skip


def _chosen(plan: Plan | str, transformer: Any) -> Plan:
    choice = choose_plan(plan, targets_of(_stand_in(transformer))).plan
    if choice is None:
        raise ValueError("plan none accelerates nothing; give auto, a speed, or the file of a plan")
    return choice


def _bill(
    model: RealSize, plan: Plan, dense: float, sparse: float, dense_attention: float, sparse_attention: float,
    count: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Of a forward pass each way, in seconds; and of all denoising steps of a clip."""
    kinds = kinds_of(plan, _sigmas(model))
    computed = {kind: kinds.count(kind) for kind in ("dense", "sparse", "cached", "region")}
    share = plan.regions.share if plan.regions is not None else 0.0
    whole = computed["dense"] + share * computed["region"]  # of a part of the tokens, which attend densely
    clip = {"dense": len(kinds) * dense, "plan": whole * dense + computed["sparse"] * sparse}
    return {
        "seconds": {"dense": dense * model.passes, "plan": sparse * model.passes},
        "attention_share": {"dense": dense_attention / dense, "plan": sparse_attention / sparse},
        "tflops": {"dense": count["tflop"] / dense},
        "speedup": {"attention": dense_attention / sparse_attention, "step": dense / sparse},
        "steps": computed,
        "clip_seconds": {name: value * model.passes for name, value in clip.items()},
        "clip_speedup": clip["dense"] / clip["plan"],
    }


def kinds_of(plan: Plan, sigmas: tuple[float, ...]) -> list[str]:
    """What every step of a generation is."""
    return [plan.schedule.kind(step, sigmas) for step in range(len(sigmas))]


def _sigmas(model: RealSize) -> tuple[float, ...]:
    levels = (1 - step / model.steps for step in range(model.steps))
    return tuple(model.shift * each / (1 + (model.shift - 1) * each) for each in levels)


class _Pipe(SimpleNamespace):
    """What `accelerate` looks at of a pipeline, around a transformer that stands alone."""

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}


def _stand_in(transformer: Any, shift: float = 1.0) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    device = next(transformer.parameters()).device
    return _Pipe(transformer=transformer, scheduler=scheduler, device=device, config=SimpleNamespace())


def measured(
    model: RealSize, plan: Plan | str, device: torch.device, dtype: torch.dtype, layers: int, rounds: int,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """What a step takes here: one dense and one sparse forward pass in turn, medians of `rounds`. With fewer `layers`
    of each kind, what the others take is scaled, and the result says so."""
    progress("building the transformer")
    transformer = model.transformer(device, dtype, layers)
    count = counted(model)
    arguments = model.arguments(device, dtype)
    pipe = _stand_in(transformer, model.shift)
    chosen = _chosen(plan, transformer)
    here = len(_family(transformer).sites(transformer))
    scale = count["sites"] / here
    found: dict[str, list[tuple[float, float]]] = {"dense": [], "plan": []}
    with torch.no_grad(), accelerate(pipe, chosen, cache="none", regions="none") as handle:
        pipe.scheduler.set_timesteps(model.steps, device=device)
        kinds = kinds_of(chosen, handle.sigmas)
        if "sparse" not in kinds or chosen.patterns == {"dense"}:
            raise ValueError(f"the plan {chosen.name!r} has no sparse step, so there is nothing to measure")
        sparse = kinds.index("sparse")
        progress(f"warming up, {here} layers")
        for step in range(max(0, sparse - 1), sparse + 1):  # patterns learn in the last dense step
            _timed(transformer, arguments, pipe, step, handle, device)
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}")
            for name, step in (("dense", 0), ("plan", sparse)):
                found[name].append(_timed(transformer, arguments, pipe, step, handle, device))
        report = handle.report()
    medians = {
        name: tuple(statistics.median(each[i] for each in times) * scale for i in (0, 1))
        for name, times in found.items()
    }
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        **count, "plan": chosen.name, "hardware": str(device), "dtype": str(dtype).removeprefix("torch."),
        "estimate": False, "layers_measured": here, "layers": count["sites"], "peak_gib": peak,
        "density": report.density, "fallbacks": list(report.fallbacks),
        **_bill(
            model, chosen, medians["dense"][0], medians["plan"][0], medians["dense"][1], medians["plan"][1], count
        ),
    }  # fmt: skip


def _timed(
    transformer: Any, arguments: dict[str, Any], pipe: Any, step: int, handle: Acceleration, device: torch.device
) -> tuple[float, float]:
    """Seconds of a forward pass at a step, and of attention in it."""
    pipe.scheduler.set_begin_index(step)
    before = handle.report().attention_seconds
    time_of_step = pipe.scheduler.timesteps[step].expand(arguments["hidden_states"].shape[0])
    _wait(device)
    start = time.perf_counter()
    transformer(timestep=time_of_step, return_dict=False, **arguments)
    _wait(device)
    return time.perf_counter() - start, handle.report().attention_seconds - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
