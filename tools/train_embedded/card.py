"""Write the model card: recipe, seeds, loss curve, evaluation, samples.

    PYTHONPATH=.:tools python -m train_embedded.card --vae runs/vae --transformer runs/dit \
        --evaluations runs/evaluation64 runs/evaluation128 --out docs/embedded_model.md

The pictures go to `images/` beside the card; the contact sheet is the last evaluation's.
"""

import argparse
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from train_embedded.checkpoint import load_checkpoint
from train_embedded.evaluate import ATTRIBUTES
from train_embedded.scene import all_words, split_words

TARGETS = {"color": 0.95, "background": 0.95, "motion": 0.90, "shape": 0.80}

CARD = """# The embedded model

A text-to-video model of {millions:.1f} million parameters that this repository trains itself and ships, so that the
program can be tried and tested without a download. It is an ordinary Diffusers folder:
`WanPipeline.from_pretrained("pointillist/pipelines/embedded/model")` loads it with no code of ours.

![Sixteen clips from prompts never trained on, five frames each](images/contact_sheet.png)

## What it draws
One object per clip: colour × shape × motion × background, in plain English with some freedom of wording
(`a red circle moving left on black`, `the blue star, that spins, on a gray background`).
{combinations} combinations exist; {held_out} of them were kept out of training and are what the evaluation asks for.
Words it does not know get a hint on stderr. It does not draw two objects, and it knows nothing else.

| | |
|---|---|
| transformer | `WanTransformer3DModel`: {layers} layers, {heads} heads × {head_dim}, patch 1×1×1, {dit:.2f} M |
| autoencoder | `AutoencoderKLWan`: 8× in space, 4× in time, {latent} channels, {vae:.2f} M |
| text | `UMT5EncoderModel`: 2 layers × {text_dim}, one token per word, {text:.2f} M |
| default clip | 176 × 176 pixels, 33 frames: 9 × 22 × 22 = 4,356 tokens, 20 steps, guidance 5 |
| small clip | 64 × 64 pixels, 33 frames: 9 × 8 × 8 = 576 tokens |

## How good it is
Clips from held-out prompts, judged by plain image analysis (`tools/train_embedded/judge.py`: colours by medians,
motion by the centroid's path, shape by its outline; tested on ground-truth renderings). Dense attention,
20 steps, guidance 5.

{evaluation}

{missed}

## How it was trained
Clips are rendered procedurally (`tools/train_embedded/scene.py`), the autoencoder is trained on crops and frozen,
clips are encoded once, and the transformer learns the velocity of a rectified flow, coarse to fine. The text encoder
is trained first, on captions alone, until linear maps read all four attributes off every one of its states, and is
then frozen. Seed {seed} throughout; batch n of a stage is a function of the seed and n alone. Muon trains the matrices
(convolutions included), AdamW everything else; captions are dropped in 10 % of the clips, and the weights are averaged.

{recipe}

A stage names the folders of latents that it draws from, by the clips' side in pixels, and the numbers of latent frames
per sample if not whole clips. {runs}

![Loss of the transformer over its steps](images/training_loss.png)

To train on, on a CPU or a GPU, from the shipped weights:

    export PYTHONPATH=.:tools
    python -m train_embedded.latents --vae pointillist/pipelines/embedded/model/vae --out runs/latents176 --size 176
    python -m train_embedded.transformer --run runs/dit --start pointillist/pipelines/embedded/model \\
        --latents runs/latents176 --steps 3000 --batch 2 --rate 5e-4 --final-rate 5e-5

Every tool resumes where it stopped; `tools/train_embedded/README.md` has the whole way.
"""


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a training log, the later one where a step was done twice."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return sorted({line["step"]: line for line in lines}.values(), key=lambda line: line["step"])


def stages_of(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name, last step, last loss and seconds of every stage, in order."""
    stages: dict[str, dict[str, Any]] = {}
    for line in log:
        name = line.get("stage", "autoencoder")
        stage = stages.setdefault(name, {"name": name, "seconds": 0.0, "first": line["step"]})
        stage |= {"last": line["step"], "loss": line["loss"]}
    for before, line in pairwise(log):
        if line.get("stage", "autoencoder") == before.get("stage", "autoencoder"):
            # a restart sets the clock back
            stages[line.get("stage", "autoencoder")]["seconds"] += max(0.0, line["seconds"] - before["seconds"])
    return list(stages.values())


def recipe_table(vae: Path, transformers: list[Path]) -> str:
    """A Markdown table of all stages."""
    rows = ["| | stage | to step | loss at its end | minutes on 2 cores |", "|---|---|---|---|---|"]
    for part, run in [("autoencoder", vae), *((f"transformer, run {i + 1}", r) for i, r in enumerate(transformers))]:
        for stage in stages_of(read_log(run)):
            name = "" if run == vae else short_name(stage)
            rows.append(f"| {part} | {name} | {stage['last']} | {stage['loss']:.3f} | {stage['seconds'] / 60:.0f} |")
    return "\n".join(rows)


def short_name(stage: dict[str, Any]) -> str:
    """The stage without its last step and without words that all stages share."""
    name = stage["name"].split("→")[0].replace("latents", "").replace("in windows", "windows")
    return re.sub(r",\s*", ", ", name)


def told_runs(count: int) -> str:
    """How several runs follow each other."""
    if count == 1:
        return ""
    return (
        "Each run started from the weights of the one before it, with the text encoder, the text embedder and "
        "cross-attention drawn anew; the first ones trained the text encoder together with the transformer, which "
        "taught it the words too slowly, so that only what they had learned of pictures was kept."
    )


def evaluation_table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: one column per evaluated grid."""
    headings = [f"{r['size']} × {r['size']} ({9 * (r['size'] // 8) ** 2:,} tokens)" for r in results]
    rows = [f"| | wanted | {' | '.join(headings)} |", "|---" * (2 + len(results)) + "|"]
    for name in ATTRIBUTES:
        rows.append(
            f"| {name} | {TARGETS[name]:.0%} | " + " | ".join(f"{r['right'][name]:.1%}" for r in results) + " |"
        )
    rows.append("| all four | | " + " | ".join(f"{r['right']['all']:.1%}" for r in results) + " |")
    rows.append("| clips | | " + " | ".join(str(r["clips_judged"]) for r in results) + " |")
    return "\n".join(rows)


def told_misses(result: dict[str, Any]) -> str:
    """What the last evaluated grid does not reach."""
    misses = [name for name in ATTRIBUTES if result["right"][name] < TARGETS[name]]
    if not misses:
        return "All of it is reached."
    return f"Not reached: {', '.join(misses)}. The training can be resumed (below)."


def draw_loss(logs: list[list[dict[str, Any]]], path: Path) -> None:
    """One line per stage, run after run, on a logarithmic scale."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    before = 0
    for run, log in enumerate(logs):
        for stage in stages_of(log):
            points = [(before + line["step"], line["loss"]) for line in log if line["stage"] == stage["name"]]
            axes.plot(*zip(*points, strict=True), label=f"run {run + 1}: {short_name(stage)}")
        before += log[-1]["step"]
    axes.set(xlabel="step", ylabel="velocity loss (mean of 20 steps)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("pointillist/pipelines/embedded/model"))
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, nargs="+", required=True, help="runs, in their order")
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/embedded_model.md"))
    args = parser.parse_args()

    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(args.model)
    sizes = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6
             for name in ("transformer", "vae", "text_encoder")}  # fmt: skip
    config = pipe.transformer.config
    images = args.out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw_loss([read_log(run) for run in args.transformer], images / "training_loss.png")
    shutil.copyfile(args.evaluations[-1] / "contact_sheet.png", images / "contact_sheet.png")
    results = [json.loads((folder / "results.json").read_text()) for folder in args.evaluations]
    args.out.write_text(
        CARD.format(
            millions=sum(sizes.values()), combinations=len(all_words()), held_out=len(split_words()[1]),
            layers=config.num_layers, heads=config.num_attention_heads, head_dim=config.attention_head_dim,
            dit=sizes["transformer"], latent=config.in_channels, vae=sizes["vae"],
            text_dim=config.text_dim, text=sizes["text_encoder"],
            evaluation=evaluation_table(results), missed=told_misses(results[-1]),
            seed=load_checkpoint(args.transformer[-1] / "last.safetensors")[1]["seed"],
            recipe=recipe_table(args.vae, args.transformer), runs=told_runs(len(args.transformer)),
        )
    )  # fmt: skip
    print(args.out)


if __name__ == "__main__":
    main()
