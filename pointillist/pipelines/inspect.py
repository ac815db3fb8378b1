"""Looking into a finished clip: what every head looked at in one step, and what its plan kept of it.

The clip is made again from its settings, without decoding it. Of one step and the branch with the prompt, the queries
and keys of every head are written to a file, and the pairs of blocks that were computed. Everything that is shown is
computed from them when it is asked for, one head at a time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pointillist.accel.plan import Plan
from pointillist.files import write_whole
from pointillist.pipelines.again import facts_of, request_of
from pointillist.pipelines.events import Phase, Progress, Step, silent
from pointillist.pipelines.generate import Load, prepare
from pointillist.pipelines.video import OutputError, check_output

if TYPE_CHECKING:
    import torch

    from pointillist.accel.layouts import Laid
    from pointillist.accel.report import Report
    from pointillist.accel.tiles import Grid

LIMIT = 512 * 2**20
"""Bytes of queries, keys and token orders that are kept at most: of the heads nearest to the wanted layer."""
CELLS = 96
"""Maps have at most so many rows and columns."""
ALL_ROWS = 8192
"""In videos of more tokens, some queries stand for all of a row of a map."""
SOME_ROWS = 16
SUFFIX = ".safetensors"
KEY = "pointillist.recording"


@dataclass(frozen=True)
class InspectRequest:
    """Which step of which clip to look into.

    Raises:
        ValueError: a value that cannot be, with the allowed ones.
    """

    clip: Path
    """A clip that `generate` wrote."""
    output: Path
    """The recording, FILE.safetensors."""
    step: int | None = None
    """Counted from 0; None is the one in the middle of the sparse steps."""
    layer: int = 0
    """Where not all heads can be kept, those of the layers next to this one are."""
    device: str | None = None
    """None: that of the clip."""
    download: bool = False

    def __post_init__(self) -> None:
        if self.output.suffix.lower() != SUFFIX:
            raise ValueError(f"the recording {str(self.output)!r} must end in {SUFFIX}")
        if self.layer < 0 or (self.step is not None and self.step < 0):
            raise ValueError(f"step {self.step} of layer {self.layer} is not possible; both are counted from 0")


@dataclass(frozen=True)
class Seen:
    """What one token sees of the others."""

    weights: np.ndarray
    """float32 [T, H, W]: its attention; sums to 1."""
    kept: np.ndarray
    """bool [T, H, W]: what the plan lets it see."""

    @property
    def recall(self) -> float:
        """The share of its attention that the plan keeps."""
        return float(self.weights[self.kept].sum())


def inspect(request: InspectRequest, progress: Progress = silent, load: Load | None = None) -> Recording:
    """Carry out `request`; `progress` is called with all that happens. Pipelines come from `load`, or `load_pipeline`.

    Raises:
        ValueError, AccelerateError, PlanError, ModelError, OutputError: one sentence on what was given and allowed.
    """
    import torch

    from pointillist.accel.accelerate import accelerate
    from pointillist.accel.choose_plan import choose_plan
    from pointillist.accel.conflicts import targets_of
    from pointillist.pipelines.call import takes

    check_output(request.output)
    facts = facts_of(request.clip)
    if "repaint" in facts:
        raise OutputError(
            f"{str(request.clip)!r} was repainted, so it cannot be made again from its settings; look into the clip "
            f"that it was made of, {facts['repaint'].get('clip')}"
        )
    original = request_of(request.clip, facts, request.device, request.download)
    step = _step(request.step, facts)
    progress(Phase("loading the model"))
    pipe, plan, call = prepare(original, load)
    targets = targets_of(pipe, sparse=plan != "none")
    chosen = choose_plan(plan, targets).plan
    layers = {
        f"{target.name}.{path}": layer
        for target in targets
        for layer, path in enumerate(target.family.site_names(target.transformer))
    }
    steps = facts["steps"]

    def after_step(pipe: Any, done: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(Step("making the clip again", done + 1, steps))
        return tensors

    how: Any = {"cache": original.cache, "regions": original.regions, "dense": original.dense}
    progress(Step("making the clip again", 0, steps))
    with accelerate(pipe, plan, **how) as handle, torch.no_grad():
        recorder = _Recorder(handle, layers, step, request.layer, chosen)
        handle.observe(recorder.observe)
        handle.observe_layouts(recorder.observe_layout)
        generator = torch.Generator("cpu").manual_seed(facts["seed"])
        told = {"callback_on_step_end": after_step} if "callback_on_step_end" in takes(pipe) else {}
        pipe(**call, **told, generator=generator, output_type="latent")
        report, sigmas = handle.report(), handle.sigmas
    progress(Phase("writing"))
    recorder.save(request.output, request.clip, facts, report, sigmas)
    return Recording.load(request.output)


@dataclass(frozen=True)
class Recording:
    """What `inspect` wrote. Tensors are read when they are needed, so it takes no memory itself."""

    path: Path
    clip: Path
    step: int
    kind: str
    """What the step was: `dense` or `sparse`."""
    grid: Grid
    sites: tuple[str, ...]
    """The layers, by their names."""
    heads: int
    kept_places: tuple[tuple[int, int], ...] = field(repr=False)
    """Layers and heads whose queries and keys there are."""
    kinds: tuple[str, ...] = field(repr=False)
    """Of every step of the clip, as it was made again."""
    sigmas: tuple[float, ...] = field(repr=False)
    step_seconds: tuple[float, ...] = field(repr=False)
    call_seconds: dict[str, dict[str, float]] = field(repr=False)
    """Of each site the mean seconds of its calls, by what they were."""
    facts: dict[str, Any] = field(repr=False)
    """Of the clip."""
    plan: Plan | None = field(repr=False)
    """What ran; None if everything was dense."""

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Raises OutputError for a file that is none."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise OutputError(f"there is no file {str(path)!r}")
        try:
            with safe_open(str(path), framework="pt") as file:
                values = json.loads((file.metadata() or {})[KEY])
            plan = values.pop("plan")
            values["kept_places"] = tuple((layer, head) for layer, head in values["kept_places"])
            for name in ("grid", "sites", "kinds", "sigmas", "step_seconds"):
                values[name] = tuple(values[name])
            return cls(
                path=path,
                **{**values, "clip": Path(values["clip"])},
                plan=None if plan is None else Plan.from_json(plan),
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{str(path)!r} is not what `inspect` writes: {error}") from error

    @cached_property
    def refreshed(self) -> np.ndarray | None:
        """float32 [T, H, W]: in what share of the steps each token was computed; None if all were in every step."""
        return self._tensors("refreshed")[0].numpy() if "refreshed" in self._names else None

    def attention(self, layer: int, head: int) -> np.ndarray:
        """float32 [n, n]: the attention between runs of tokens, in units of a uniform one. Raises ValueError."""
        from pointillist.search.profile import attention_map

        q, k = self._q_and_k(layer, head)
        rows = 0 if math.prod(self.grid) <= ALL_ROWS else SOME_ROWS
        found = attention_map(_call(q[None, None], k[None, None], self.grid), CELLS, rows)[0].numpy()
        return found * len(found)

    def kept(self, layer: int, head: int) -> np.ndarray:
        """float32 [n, n]: the share of the pairs that were computed, in the same runs. Raises ValueError."""
        from pointillist.accel.blocks import Blocks
        from pointillist.accel.patterns.pattern import Selection
        from pointillist.search.evaluate import kept_map

        tokens = math.prod(self.grid)
        cells = -(-tokens // -(-tokens // CELLS))
        if (layout := self._layout(layer, head)) is None:
            return np.ones((cells, cells), np.float32)
        mask, *sides = layout
        queries, keys = (Blocks(order[None, None].long(), bounds[None, None], tokens) for order, bounds in sides)
        return kept_map(Selection(queries, keys, mask[None, None], 0), cells)[0].numpy()

    def seen(self, layer: int, head: int, token: int) -> Seen:
        """What a token of the grid sees, by its number. Raises ValueError."""
        if not 0 <= token < math.prod(self.grid):
            raise ValueError(f"token {token} is none of the grid {self.grid}")
        q, k = self._q_and_k(layer, head)
        weights = (k @ q[token] * q.shape[-1] ** -0.5).softmax(0)
        kept = np.ones(len(k), bool)
        if (layout := self._layout(layer, head)) is not None:
            from pointillist.kernels.layout import block_of_place

            mask, (order, bounds), (key_order, key_bounds) = layout
            place = int((order == token).nonzero()[0, 0])
            row = mask[int(block_of_place(bounds[None, None], len(order))[0, 0, place])]
            of_place = block_of_place(key_bounds[None, None], len(key_order))[0, 0]
            kept[key_order.numpy()] = row[of_place].numpy()
        return Seen(weights.numpy().reshape(self.grid), kept.reshape(self.grid))

    def density(self, layer: int, head: int) -> float:
        """The share of the pairs that the head computed. Raises ValueError."""
        if (layout := self._layout(layer, head)) is None:
            return 1.0
        mask, (_, bounds), (_, key_bounds) = layout
        sizes, key_sizes = (each.diff().double() for each in (bounds, key_bounds))
        return float(sizes @ mask.double() @ key_sizes / math.prod(self.grid) ** 2)

    @cached_property
    def _names(self) -> frozenset[str]:
        from safetensors import safe_open

        with safe_open(str(self.path), framework="pt") as file:
            return frozenset(file.keys())

    def _tensors(self, *names: str) -> list[torch.Tensor]:
        from safetensors import safe_open

        with safe_open(str(self.path), framework="pt") as file:
            return [file.get_tensor(name) for name in names]

    def _q_and_k(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [S, D], in the order of the grid."""
        self._check(layer, head)
        q, k = self._tensors(f"{layer}.{head}.q", f"{layer}.{head}.k")
        return q.float(), k.float()

    def _layout(self, layer: int, head: int) -> tuple[Any, Any, Any] | None:
        """Kept pairs bool [nq, nk], then order and bounds of the query blocks, and of the key blocks; None if all."""
        self._check(layer, head)
        if f"{layer}.{head}.mask" not in self._names:
            return None
        mask, *sides = self._tensors(*(f"{layer}.{head}.{name}" for name in ("mask", *SIDES)))
        return mask, (sides[0], sides[1]), (sides[2], sides[3])

    def _check(self, layer: int, head: int) -> None:
        if (layer, head) not in self.kept_places:
            raise ValueError(
                f"head {head} of layer {layer} is not in this recording, which holds {len(self.kept_places)} of "
                f"{len(self.sites) * self.heads}: record the clip again at this layer"
            )


@dataclass(frozen=True)
class Recordings:
    """The recordings of a folder, of which the newest are kept. They are named by their clips and steps."""

    folder: Path
    most: int = 3

    def path(self, clip: Path, step: int) -> Path:
        """Where that of a clip's step is, or goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{clip.stem}-{step}{SUFFIX}"

    def find(self, clip: Path, step: int) -> Recording | None:
        """That of a clip's step, if there is one that can be read."""
        try:
            return Recording.load(self.path(clip, step))
        except OutputError:
            return None

    def make_room(self) -> None:
        """Delete all but the newest, one fewer than may be."""
        files = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in files[max(0, self.most - 1) :]:
            old.unlink(missing_ok=True)


SIDES = ("query_order", "query_bounds", "key_order", "key_bounds")


class _Recorder:
    """Observes a run, and keeps one step of its first branch, which is that with the prompt."""

    def __init__(self, handle: Any, layers: dict[str, int], step: int, wanted: int, plan: Plan | None) -> None:
        self._handle, self._layers, self._step, self._wanted, self._plan = handle, layers, step, wanted, plan
        self._branch: str | None = None
        self._laid: Laid | None = None
        self._sites: list[str] = []
        self._heads = 0
        self._places: frozenset[tuple[int, int]] = frozenset()
        self._tensors: dict[str, torch.Tensor] = {}

    def observe_layout(self, site: str, branch: str, step: int | None, laid: Laid) -> None:
        """See `Acceleration.observe_layouts`. It comes before `observe` of the same call."""
        self._laid = laid

    def observe(self, site: str, branch: str, step: int | None, q: Any, k: Any, v: Any, out: Any) -> None:
        """See `Acceleration.observe`."""
        laid, self._laid, grid = self._laid, None, self._handle.grid
        if step != self._step or grid is None or q.shape[1] != math.prod(grid):
            return
        self._branch = branch if self._branch is None else self._branch
        if branch != self._branch:
            return
        if not self._sites:
            self._begin(site, *q.shape[1:])
        layer, order = self._layers[site], self._order(grid, q.device)
        for head in range(self._heads):
            if (layer, head) not in self._places:
                continue
            for name, x in (("q", q), ("k", k)):
                mine = x[-1, :, head]  # of branches in one batch, the last has the prompt
                self._keep(layer, head, name, (mine if order is None else mine[order.argsort()]).half())
            if laid is not None:
                self._keep_layout(layer, head, laid, order)

    def _begin(self, site: str, tokens: int, heads: int, dim: int) -> None:
        transformer = site.partition(".")[0]
        self._sites = [name for name in self._layers if name.partition(".")[0] == transformer]
        self._heads = heads
        places = [(layer, head) for layer in range(len(self._sites)) for head in range(heads)]
        places.sort(key=lambda place: abs(place[0] - self._wanted))
        self._places = frozenset(places[: LIMIT // (tokens * (4 * dim + 8))])

    def _keep_layout(self, layer: int, head: int, laid: Laid, order: torch.Tensor | None) -> None:
        layout = laid.layout
        self._keep(layer, head, "mask", _of(layout.mask(), head))
        for side in ("query", "key"):
            lying, bounds = getattr(layout, f"{side}_order"), getattr(layout, f"{side}_bounds")
            mine = _tokens(layout) if lying is None else _of(lying, head)
            self._keep(layer, head, f"{side}_order", (mine if order is None else order[mine]).int())
            self._keep(layer, head, f"{side}_bounds", _of(bounds, head))

    def _keep(self, layer: int, head: int, name: str, x: torch.Tensor) -> None:
        self._tensors[f"{layer}.{head}.{name}"] = x.cpu().contiguous().clone()

    def _order(self, grid: Grid, device: Any) -> torch.Tensor | None:
        """int64 [S]: the token of the grid at each place of the sequence; None if it is the same."""
        from pointillist.accel.blocks import blocks_in

        if self._plan is None or not self._plan.hoist:
            return None
        return blocks_in(self._plan.hoist, grid, self._plan.block, device).order[0, 0]

    def save(self, path: Path, clip: Path, facts: dict[str, Any], report: Report, sigmas: tuple[float, ...]) -> None:
        """Raises OutputError if nothing was seen, or the file cannot be written."""
        import torch
        from safetensors.torch import save

        if not self._places:
            raise OutputError(
                f"step {self._step} of {str(clip)!r} shows no attention of the whole video: it may be reused, compute "
                "a part of the tokens, or see text in the same attention; choose a dense or a sparse step"
            )
        if report.refreshed:
            self._tensors["refreshed"] = torch.tensor(report.refreshed).reshape(report.grid)
        values = {
            "clip": str(clip), "step": self._step, "kind": report.kinds[self._step], "grid": report.grid,
            "sites": self._sites, "heads": self._heads, "kept_places": sorted(self._places), "kinds": report.kinds,
            "sigmas": sigmas, "step_seconds": report.step_seconds,
            "call_seconds": {site: report.call_seconds[site] for site in self._sites},
            "facts": facts, "plan": None if self._plan is None else self._plan.to_json(),
        }  # fmt: skip
        try:
            write_whole(path, save(self._tensors, {KEY: json.dumps(values, allow_nan=False)}))
        except OSError as error:
            raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def _of(x: torch.Tensor, head: int) -> torch.Tensor:
    """Of x [B|1, H|1, …], a head of the last batch entry."""
    return x[-1, head if x.shape[1] > 1 else 0]


def _tokens(layout: Any) -> torch.Tensor:
    import torch

    return torch.arange(layout.q_len, device=layout.device)


def _call(q: torch.Tensor, k: torch.Tensor, grid: Grid) -> Any:
    """An attention call as patterns see it, of q, k [B, H, S, D]."""
    from pointillist.accel.patterns.pattern import Call
    from pointillist.accel.tiles import whole_video

    return Call(q, k, k, q.shape[-1] ** -0.5, grid, whole_video(grid))


def _step(asked: int | None, facts: dict[str, Any]) -> int:
    """The step to look into. Raises ValueError for one that has no attention of all tokens."""
    kinds = list(facts.get("kinds") or ["sparse"] * facts["steps"])
    if asked is None:
        sparse = [step for step, kind in enumerate(kinds) if kind == "sparse"] or list(range(len(kinds)))
        return sparse[len(sparse) // 2]
    if asked >= len(kinds):
        raise ValueError(f"step {asked} is not in the clip; it has the steps 0 to {len(kinds) - 1}")
    if kinds[asked] in ("cached", "region"):
        able = ", ".join(str(step) for step, kind in enumerate(kinds) if kind in ("dense", "sparse"))
        what = "reuses another step" if kinds[asked] == "cached" else "computes a part of the tokens"
        raise ValueError(
            f"step {asked} {what}, so there is no attention to look at; those of {able} can be looked into"
        )
    return asked


def frames_of(times: int, frames: int) -> tuple[int, ...]:
    """For each latent frame, the frame of the clip that shows it: the one in the middle of those it stands for."""
    per_token = max(1, (frames - 1) // max(1, times - 1))
    return (0, *(min(frames - 1, 1 + (time - 1) * per_token + per_token // 2) for time in range(1, times)))
