"""Compare: a clip beside its dense twin of the same seed: in step, under a slider, as a difference, in numbers."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from pointillist.metrics import compare
from pointillist.pipelines.engine import Engine, Job
from pointillist.pipelines.generate import GenerateRequest
from pointillist.pipelines.video import OutputError, read_clip
from pointillist.web.files import address
from pointillist.web.job_panel import JobPanel, duration
from pointillist.web.settings import chips, settings_of
from pointillist.web.shared import Shared

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
PLAYER = Path(__file__).parent / "player.js"
TEMPLATE = """
<div class="player" data-spec="${value}">
  <div class="stage"></div>
  <div class="bar">
    <button class="play" aria-label="play or pause">▶</button>
    <input class="frame" type="range" min="0" value="0" aria-label="frame">
    <span class="said"></span>
  </div>
  <div class="bar modes">
    <button data-mode="side" class="on">Side by side</button>
    <button data-mode="slider">Slider</button>
    <button data-mode="difference">Difference</button>
    <label class="gain">× <input type="range" min="1" max="20" value="5" aria-label="amplification"><b>5</b></label>
  </div>
</div>
"""

CSS = """
.player[data-spec=""] { display: none; }
.player .stage { display: flex; gap: 6px; justify-content: center; touch-action: none; position: relative; }
.player figure { margin: 0; flex: 1 1 0; max-width: calc(50vh * var(--aspect, 1)); min-width: 0; }
.player canvas { width: 100%; display: block; border-radius: 6px; background: #000; image-rendering: auto; }
.player figcaption { text-align: center; font-size: .85rem; padding-top: .2rem; color: var(--body-text-color-subdued); }
.player .bar { display: flex; gap: .6rem; align-items: center; margin-top: .6rem; flex-wrap: wrap; }
.player input { appearance: none; height: 6px; border-radius: 3px; background: var(--block-border-color); }
.player input::-webkit-slider-thumb { appearance: none; width: 16px; height: 16px; border-radius: 50%;
  background: var(--primary-500); }
.player input::-moz-range-thumb { border: 0; background: var(--primary-500); }
.player .frame { flex: 1 1 160px; }
.player .said { min-width: 11rem; font-variant-numeric: tabular-nums; text-align: right; font-size: .9rem; }
.player button { padding: .3rem .8rem; border-radius: 6px; border: 1px solid var(--block-border-color);
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); cursor: pointer;
  font-weight: 400; font-size: .9rem; }
.player button.on { background: var(--primary-500); color: #fff; border-color: var(--primary-500); }
.player .gain { display: none; align-items: center; gap: .3rem; }
.player[data-mode="difference"] .gain { display: flex; }
.player[data-mode="slider"] canvas { cursor: ew-resize; }
.numbers { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: .4rem 0 .8rem; }
.numbers div b { display: block; font-size: 1.4rem; line-height: 1.2; }
.numbers div { color: var(--body-text-color-subdued); font-size: .85rem; }
.numbers div b { color: var(--body-text-color); }
.times { display: grid; grid-template-columns: max-content 1fr; gap: .25rem .8rem; align-items: center;
  font-size: .85rem; font-variant-numeric: tabular-nums; }
.times .what { grid-row: span 2; }
.times i { display: inline-block; height: .7rem; border-radius: 3px; vertical-align: middle; min-width: 2px; }
.times .dense i { background: var(--neutral-400); } .times .fast i { background: var(--primary-500); }
"""


def tab(engine: Engine, shared: Shared) -> None:
    """Draw the tab, and connect its events."""
    about = gr.HTML("", elem_id="compare-about")
    start = gr.Button("Run dense with the same seed", variant="primary", visible=False, elem_id="compare-start")
    status = gr.Column()
    player = gr.HTML(
        "", elem_id="compare-player", html_template=TEMPLATE, js_on_load=PLAYER.read_text(encoding="utf-8")
    )
    numbers = gr.HTML("", elem_id="compare-numbers")
    shown = [about, start, player, numbers]

    def show(name: str | None) -> list[Any]:
        path = shared.outputs.path(name or "")
        facts = None if path is None else settings_of(path)
        if path is None or facts is None:
            empty = '<div class="empty">Generate a clip, or choose one in the gallery, and compare it here.</div>'
            return [empty, gr.Button(visible=False), "", ""]
        words = f"<p>{html.escape(facts['prompt'])}</p>{chips(facts)}"
        dense = shared.outputs.path(twin(path).name)
        if dense is None:
            exact = facts.get("plan") == "none" and facts.get("cache") == "none"
            said = (
                '<p class="note">This clip is dense itself: there is nothing to compare it with.</p>' if exact else ""
            )
            return [words + said, gr.Button(visible=not exact), "", ""]
        try:
            return [words, gr.Button(visible=False), *_compared(path, facts, dense)]
        except (OutputError, ValueError) as error:
            return [words + f'<p class="note">{html.escape(str(error))}</p>', gr.Button(visible=True), "", ""]

    def finished(job: Job) -> list[Any]:
        made = job.result().output
        return show(made.name.replace("_dense", ""))

    with status:
        panel = JobPanel(engine, shared, "compare", finished, shown)

    def begin(name: str) -> list[Any]:
        path = shared.outputs.path(name or "")
        facts = None if path is None else settings_of(path)
        if path is None or facts is None:
            return panel.refuse("this clip is not there any more; choose another in the gallery")
        try:
            shared.outputs.new()  # whether there is room
            return panel.begin(engine.submit(_dense(facts, twin(path)), previews=True))
        except (ValueError, OSError) as error:
            return panel.refuse(str(error))

    start.click(begin, shared.clip, panel.begun, **QUIET)
    gr.on([shared.here.select, shared.clip.change, shared.page.load], show, shared.clip, shown, **QUIET)


def twin(path: Path) -> Path:
    """Where a clip's dense twin is."""
    return path.with_name(f"{path.stem}_dense{path.suffix}")


def _dense(facts: dict[str, Any], output: Path) -> GenerateRequest:
    """The request that makes a clip's dense twin. Raises ValueError for facts that are none of `generate`."""
    asked = facts.get("request") or {}
    try:
        return GenerateRequest(
            prompt=facts["prompt"], negative_prompt=facts["negative_prompt"], output=output, model=facts["model"],
            width=facts["width"], height=facts["height"], frames=facts["frames"], steps=facts["steps"],
            guidance=facts["guidance"], shift=asked.get("shift"), seed=facts["seed"], fps=facts["fps"], speed="exact",
            device=asked.get("device"), dtype=asked.get("dtype"), warm_up=False,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the settings of this clip lack something: {error}") from error


def _compared(path: Path, facts: dict[str, Any], dense: Path) -> list[Any]:
    """Values of the player and of the numbers."""
    apart = settings_of(dense) or {}
    found = compare(read_clip(dense), read_clip(path))
    spec = {
        "dense": address(dense), "fast": address(path), "fps": facts["fps"], "frames": facts["frames"],
        "psnr": [round(each, 2) for each in found.psnr_per_frame],
    }  # fmt: skip
    speedup = _ratio(apart, facts, "total")
    figures = [
        (f"{found.psnr:.2f} dB" if found.psnr < 100 else "identical", "PSNR of the files"),
        (f"{found.ssim:.4f}", "SSIM"),
        *([(f"{speedup:.2f}×", "speed-up in total")] if speedup else []),
        *([(f"{facts['density']:.2f}", "density")] if isinstance(facts.get("density"), int | float) else []),
    ]  # fmt: skip
    said = "".join(f"<div><b>{html.escape(value)}</b>{name}</div>" for value, name in figures)
    return [quote(json.dumps(spec)), f'<div class="numbers">{said}</div>{_bars(apart, facts)}']


def _ratio(dense: dict[str, Any], fast: dict[str, Any], what: str) -> float | None:
    before, after = ((each.get("seconds") or {}).get(what) for each in (dense, fast))
    return before / after if before and after else None


def _bars(dense: dict[str, Any], fast: dict[str, Any]) -> str:
    """Times beside each other, as HTML."""
    longest = max(
        (dense.get("seconds") or {}).get("total") or 0.0, (fast.get("seconds") or {}).get("total") or 0.0, 1e-9
    )
    rows = []
    for what, words in (("attention", "Attention"), ("denoise", "Denoising"), ("total", "In total")):
        rows.append(f'<span class="what">{words}</span>')
        for kind, facts in (("dense", dense), ("fast", fast)):
            spent = (facts.get("seconds") or {}).get(what) or 0.0
            bar = f'<i style="width:{72 * spent / longest:.1f}%"></i>'
            rows.append(f'<span class="{kind}">{bar} {duration(spent)}{" dense" if kind == "dense" else ""}</span>')
    return f'<div class="times">{"".join(rows)}</div>'
