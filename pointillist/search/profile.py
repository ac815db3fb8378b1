"""The profile: how wrong every candidate is at every site, recorded in dense runs of the calibration prompts.

One pass over the pipeline serves all heads, candidates and steps of as many layers as its memory allows. Each pass
writes one file, named by what it holds; a pass whose file exists is not run again.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from pointillist.accel.accelerate import Acceleration, accelerate
from pointillist.accel.blocks import blocks_in
from pointillist.accel.conflicts import targets_of
from pointillist.accel.patterns.masses import exact_masses
from pointillist.accel.patterns.pattern import Call
from pointillist.accel.tiles import Grid
from pointillist.files import write_whole
from pointillist.search.errors import SearchError
from pointillist.search.evaluate import TOKENS, Remembered, evaluate
from pointillist.search.run import call_of, run
from pointillist.search.sensitivity import Playback, reference_output, relative_error
from pointillist.search.study import Study

MEMORY = 8 * 2**30
"""Bytes that one pass may remember of the calibration step; more layers are divided into several passes."""
MAP_CELLS = 32
"""Attention maps for reports have so many rows and columns."""

Progress = Callable[[str, int, int], None]
"""Told of a phase, and of its steps so many done and how many there are."""


@dataclass(frozen=True)
class Profile:
    """What was recorded of all prompts and layers."""

    errors: torch.Tensor
    """float64 [buckets, layers, candidates, tails, kinds, heads]: squared relative errors of the guided output, means
    over prompts; see `evaluate.Errors`."""
    maps: torch.Tensor
    """float32 [layers, heads, cells, cells]: where a head of the first prompt looks, by runs of tokens."""
    kept: torch.Tensor
    """uint8 [layers, candidates, heads, cells, cells]: what each candidate keeps of the same call."""
    moved: torch.Tensor
    """float32 [buckets, layers]: squared relative change of the transformer's output for each squared relative error of
    a site's."""
    grid: Grid
    branches: int
    """Passes of guidance in a step."""


@dataclass(frozen=True)
class Pass:
    """One dense run: a prompt, and the layers that are looked at in it."""

    prompt: int
    layers: tuple[int, ...]


def passes(study: Study) -> list[Pass]:
    """All dense runs of a study: as many layers at once as memory allows."""
    at_once = max(1, MEMORY // bytes_of_a_layer(study))
    layers = range(study.layers)
    chunks = [tuple(layers[first : first + at_once]) for first in range(0, study.layers, at_once)]
    return [Pass(prompt, chunk) for prompt in range(len(study.prompts)) for chunk in chunks]


def bytes_of_a_layer(study: Study) -> int:
    """What a pass remembers at most of a layer: see `evaluate.py`."""
    rows = max(study.query_blocks * study.block, TOKENS)
    return 14 * len(study.rules) * len(study.tails) * study.heads * rows * study.head_dim


def file_of(folder: Path, study: Study, each: Pass) -> Path:
    """The file that holds the results of a pass."""
    return folder / f"profile-{study.digest(each.prompt, each.layers)}.safetensors"


def record(pipe: Any, study: Study, each: Pass, path: Path, told: Callable[[str], Callable[[int], None]]) -> Playback:
    """Run the pipeline densely once, and write what the candidates would do to it. Raises SearchError."""
    weights = output_weights(pipe)
    with accelerate(pipe, "none") as handle:
        recorder = Recorder(study, each, handle, weights)
        handle.observe(recorder.observe)
        handle.intercept(recorder.intercept)
        frames = run(pipe, study, study.prompts[each.prompt], told(f"trying {len(study.rules)} candidates"))
        recorder.playback.frames, recorder.playback.sigmas = frames, handle.sigmas
    recorder.save(path)
    return recorder.playback


def output_weights(pipe: Any) -> dict[str, tuple[int, torch.Tensor]]:
    """Of every site, by its name: the layer, and the output projection [C, H·D]."""
    return {
        f"{target.name}.{path}": (layer, target.family.output_weight(block, attention))
        for target in targets_of(pipe)
        for layer, (path, (block, attention)) in enumerate(
            zip(target.family.site_names(target.transformer), target.family.sites(target.transformer), strict=True)
        )
    }


class Recorder:
    """Observes a dense run."""

    def __init__(
        self, study: Study, each: Pass, handle: Acceleration, weights: dict[str, tuple[int, torch.Tensor]]
    ) -> None:
        self.study, self.handle = study, handle
        self.prompt, self.layers = each.prompt, each.layers
        looked_at = (study.calibration_step, *study.bucket_steps)
        self.playback = Playback(looked_at if len(looked_at) < study.steps else ())
        self._sites = weights
        self._known: dict[tuple[str, str], dict[Any, Remembered]] = {}
        self._errors: dict[tuple[int, int], torch.Tensor] = {}
        self._maps: dict[int, torch.Tensor] = {}
        self._kept: dict[int, torch.Tensor] = {}
        self._branches: list[str] = []
        self._grid: Grid | None = None
        self._perturbed: int | None = None
        """The layer whose attention is the reference candidate's, in a forward pass that is run for this."""
        self._site_error = 0.0
        self._moved: dict[tuple[int, int], float] = {}

    @torch.inference_mode()
    def observe(self, site: str, branch: str, step: int | None, q: Any, k: Any, v: Any, out: Any) -> Any:
        """See `Acceleration.observe`."""
        study, (layer, weight) = self.study, self._sites[site]
        if self._perturbed is not None:
            return self._perturb(weight, step, q, k, v, out) if layer == self._perturbed else None
        if branch not in self._branches:
            self._branches.append(branch)
        if layer not in self.layers or step not in (study.calibration_step, *study.bucket_steps):
            return None
        grid = self.handle.grid
        if grid is None or math.prod(grid) != q.shape[1]:
            raise SearchError(f"{site} attends over {q.shape[1]} tokens, which are not the video's alone")
        self._grid = grid
        call = call_of(study, grid, layer, step, q, k, v)
        known = self._known.setdefault((site, branch), {})
        calibrate = step == study.calibration_step
        turn, branches = self._branches.index(branch), len(self._branches)
        last = not calibrate and turn == branches - 1
        first = self._known[site, self._branches[0]] if not calibrate and turn == 1 else None
        errors = evaluate(
            call, out.transpose(1, 2), weight, study.rules, study.tails, known, study.query_blocks, calibrate,
            share=study.guidance_shares[turn] if branches == 2 else 1.0, first=first,
            cells=_cells(call) if last and layer not in self._kept else 0,
        )  # fmt: skip
        if not last:
            return None
        self._errors[study.bucket_steps.index(step), layer] = errors.values
        if errors.kept is not None:
            self._maps[layer], self._kept[layer] = attention_map(call), errors.kept
        return None

    @torch.inference_mode()
    def intercept(self, transformer: str, branch: str, step: int | None, compute: Callable[[], Any]) -> Any:
        """See `Acceleration.intercept`: behind the pass itself, passes in which one layer is perturbed."""
        output = self.playback.keep(transformer, branch, step, compute)
        if self.prompt == 0 and branch == self._branches[0] and step in self.study.bucket_steps:
            for layer in self.layers:
                self._perturbed = layer
                moved = relative_error(output[0], compute()[0])
                self._moved[self.study.bucket_steps.index(step), layer] = moved / self._site_error
            self._perturbed = None
        return output

    def _perturb(self, weight: torch.Tensor, step: int | None, q: Any, k: Any, v: Any, out: Any) -> torch.Tensor:
        assert self._grid is not None and step is not None
        instead = reference_output(call_of(self.study, self._grid, 0, step, q, k, v)).transpose(1, 2)
        self._site_error = relative_error(*(x.flatten(2).float() @ weight.float().mT for x in (out, instead)))
        return instead

    def save(self, path: Path) -> None:
        """Raises SearchError if the pipeline did not come by, OSError if the disk is full."""
        buckets = range(len(self.study.bucket_steps))
        missing = [(b, layer) for b in buckets for layer in self.layers if (b, layer) not in self._errors]
        if missing or self._grid is None:
            raise SearchError(
                f"{len(missing)} of {len(buckets) * len(self.layers)} places saw no attention of the video; the "
                "pipeline may have skipped steps or layers"
            )
        errors = torch.stack([torch.stack([self._errors[b, layer] for layer in self.layers]) for b in buckets])
        maps = torch.stack([self._maps[layer] for layer in self.layers])
        about = {"grid": self._grid, "branches": len(self._branches)}
        kept = torch.stack([self._kept[layer] for layer in self.layers])
        tensors = {"errors": errors, "maps": maps, "kept": kept}
        if self._moved:
            tensors["moved"] = torch.tensor([[self._moved[b, layer] for layer in self.layers] for b in buckets])
        write(path, to_safetensors(tensors, {"about": json.dumps(about)}))


def attention_map(call: Call, cells: int = MAP_CELLS, rows: int = 0) -> torch.Tensor:
    """float32 [H, cells, cells]: the softmax mass between runs of tokens of the first batch entry; rows sum to 1.

    Args:
        cells: at most so many, of equal runs.
        rows: queries that stand for each run, evenly spaced; 0 is all.
    """
    blocks = blocks_in("thw", call.grid, -(-math.prod(call.grid) // cells), call.device)
    masses = exact_masses(call, blocks, rows)[0].float().cpu()
    return masses / masses.sum(-1, keepdim=True).clamp(min=1e-30)


def _cells(call: Call) -> int:
    """Rows and columns of the maps of a call."""
    return blocks_in("thw", call.grid, -(-math.prod(call.grid) // MAP_CELLS), call.device).count


def load(folder: Path, study: Study) -> Profile:
    """Join what all passes have written. Raises SearchError, naming what is missing or broken."""
    each = passes(study)
    missing = [one for one in each if not file_of(folder, study, one).exists()]
    if missing:
        raise SearchError(
            f"{folder} lacks {len(missing)} of {len(each)} parts of the profile; run the other shards, or the search "
            "without --shard"
        )
    parts = [read(file_of(folder, study, one)) for one in each]
    about = json.loads(parts[0][1]["about"])
    first = [(one, tensors) for one, (tensors, _) in zip(each, parts, strict=True) if one.prompt == 0]
    by_prompt = [
        torch.cat([tensors["errors"] for one, (tensors, _) in zip(each, parts, strict=True) if one.prompt == prompt], 1)
        for prompt in range(len(study.prompts))
    ]
    return Profile(
        errors=torch.stack(by_prompt).mean(0),
        maps=torch.cat([tensors["maps"] for _, tensors in first]),
        kept=torch.cat([tensors["kept"] for _, tensors in first]),
        moved=torch.cat([tensors["moved"] for _, tensors in first], 1),
        grid=tuple(about["grid"]),
        branches=about["branches"],
    )


def write(path: Path, data: bytes) -> None:
    """A part of a search, whole or not at all. Raises SearchError if the disk is full."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise SearchError(f"{path} cannot be written: {error}; make room and run the same command again") from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Raises SearchError for a file that is not one of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise SearchError(f"{path} is broken: {error}; delete it and run the same command again") from error
