"""Diffusers' own tests of models and pipelines, plain and with every transformer accelerated at density 1.

    python benchmarks/conformance.py CHECKOUT [--families wan flux …]    # then the table in docs/models.md
    python benchmarks/conformance.py --table                             # the table anew

CHECKOUT is a folder with Diffusers' source beside the installed Diffusers, best of the same version: its tests run
against what is installed, twice. In the second run, every transformer that a test makes is accelerated with a plan of
density 1, as a pipeline's would be; the tests themselves are not touched. Tests that fail plain too show what is due to
another version, to the Hub being away, or to this machine. Nothing is fetched: tiny random ones stand in for the text
encoders and tokenizers that tests of pipelines ask for. Some tests need `pip install parameterized requests_mock`.
Results of other families stay, if they are of the same versions. The exit code is 1 if a difference, or a failure in
both runs, has no explanation in `EXPLAINED`.

This file is also the plugin that pytest loads in both runs.
"""

import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "conformance.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- conformance: written by benchmarks/conformance.py -->", "<!-- end of conformance -->"
REPORT, WRAP = "POINTILLIST_CONFORMANCE_REPORT", "POINTILLIST_CONFORMANCE_WRAP"

MODELS, PIPELINES = "tests/models/transformers/test_models_transformer_", "tests/pipelines/"
SUITES = {
    "wan": (f"{MODELS}wan.py", f"{PIPELINES}wan/test_wan.py"),
    "wan-vace": (f"{MODELS}wan_vace.py", f"{PIPELINES}wan/test_wan_vace.py"),
    "flux": (f"{MODELS}flux.py", f"{PIPELINES}flux/test_pipeline_flux.py"),
    "flux-2": (f"{MODELS}flux2.py", f"{PIPELINES}flux2/test_pipeline_flux2_klein.py"),
    "chroma": (f"{MODELS}chroma.py", f"{PIPELINES}chroma/test_pipeline_chroma.py"),
    "hunyuan-video": (f"{MODELS}hunyuan_video.py", f"{PIPELINES}hunyuan_video/test_hunyuan_video.py"),
    "hunyuan-video-1.5": (f"{MODELS}hunyuan_1_5.py", f"{PIPELINES}hunyuan_video1_5/test_hunyuan_1_5.py"),
    "cogvideox": (f"{MODELS}cogvideox.py", f"{PIPELINES}cogvideo/test_cogvideox.py"),
    "ltx": (f"{MODELS}ltx.py", f"{PIPELINES}ltx/test_ltx.py"),
    "ltx-2": (f"{MODELS}ltx2.py",),
    "mochi": (f"{MODELS}mochi.py", f"{PIPELINES}mochi/test_mochi.py"),
    "skyreels-v2": (f"{MODELS}skyreels_v2.py", f"{PIPELINES}skyreels_v2/test_skyreels_v2.py"),
    "cosmos": (f"{MODELS}cosmos.py", f"{PIPELINES}cosmos/test_cosmos.py"),
    "sd3": (f"{MODELS}sd3.py", f"{PIPELINES}stable_diffusion_3/test_pipeline_stable_diffusion_3.py"),
    "pixart": (
        "tests/models/transformers/test_models_pixart_transformer2d.py",
        f"{PIPELINES}pixart_sigma/test_pixart.py",
    ),
    "qwen-image": (f"{MODELS}qwenimage.py", f"{PIPELINES}qwenimage/test_qwenimage.py"),
    "nucleus-moe": (f"{MODELS}nucleusmoe_image.py",),
    "lumina-next": (f"{MODELS}lumina.py", f"{PIPELINES}lumina/test_lumina_nextdit.py"),
    "lumina-2": (f"{MODELS}lumina2.py", f"{PIPELINES}lumina2/test_pipeline_lumina2.py"),
    "hidream": (f"{MODELS}hidream.py", f"{PIPELINES}hidream_image/test_pipeline_hidream.py"),
    "z-image": (f"{MODELS}z_image.py", f"{PIPELINES}z_image/test_z_image.py"),
}
KINDS = ("passed", "skipped", "failed")
LEFT_OUT = "not Training and not Quant and not GGUF and not BitsAndBytes and not TorchAo and not SingleFile"

EXPLAINED: tuple[tuple[str, str], ...] = (
    (
        r"pixart\.py::.*::test_inference|(Wan|CogVideoX|HunyuanVideo|Diffusion3|QwenImage|HiDreamImage)Pipeline"
        r"(FastTests)?::test_inference$",
        "compares pixels with those of another text encoder than the stand-in",
    ),
    (r"test_vae_tiling$", "tiles of random weights differ by 0.32, where the test allows 0.2"),
    (r"test_correct_class_remapping_from_pretrained_config$", "fetches a configuration from the Hub"),
    (
        r"PixArtSigma.*::test_fused_qkv_projections$",
        "compares runs whose text encoder is in training mode, with dropout",
    ),
    (r"CogVideoX.*::test_faster_cache_inference$", "FasterCache is off by more than 0.1 with these text encoders"),
)
"""(what the test's name matches, why it differs, or fails in both runs)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?")
    parser.add_argument("--families", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    given = parser.parse_args()
    if given.table == (given.checkout is not None):
        parser.error("give CHECKOUT or --table")
    if given.checkout is not None:
        measure(given.checkout, given.families, given.output)
    results = json.loads(given.output.read_text())
    if given.output == RESULTS:
        PAGE.write_text(in_page(PAGE.read_text(), results))
    return 1 if any(_unexplained(name, suite) for name, suite in results["families"].items()) else 0


def measure(checkout: Path, families: list[str], output: Path) -> None:
    """Run the tests, and write what became of them."""
    import diffusers
    import torch

    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False)
    facts = dict(
        diffusers=diffusers.__version__, tests_of=head.stdout.strip(), torch=torch.__version__,
        left_out=LEFT_OUT.replace("not ", "").replace(" and ", ", "),
    )  # fmt: skip
    suites = _found_before(output, facts)
    for name in families:
        suites[name] = _both(checkout, name)
        ordered = {each: suites[each] for each in SUITES if each in suites}
        # After each, so that a run that is cut off has the others.
        output.write_text(json.dumps(dict(facts, families=ordered), indent=1) + "\n")


def _unexplained(name: str, suite: dict[str, Any]) -> list[str]:
    """Tests that differ, or fail in both runs, for a reason that is not known; told as well."""
    found = {each["test"]: f"{each['plain']} plain, {each['wrapped']} wrapped" for each in suite["differences"]}
    found |= {test: message for test, message in suite["failed_plain"].items() if test not in found}
    unexplained = {test: what for test, what in found.items() if not _why(test)}
    for test, what in unexplained.items():
        print(f"{name}: unexplained: {test}: {what}")
    return list(unexplained)


def table(results: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        "| family | plain | wrapped | differ | accelerated | attention calls | what fails or is refused, and why |"
    ]
    lines.append("|---" * 7 + "|")
    for name, suite in results["families"].items():
        counts = [", ".join(f"{suite[run].get(kind, 0)} {kind}" for kind in KINDS) for run in ("plain", "wrapped")]
        whys: dict[str, list[str]] = {}
        for test in [*(each["test"] for each in suite["differences"]), *suite["failed_plain"]]:
            whys.setdefault(_why(test) or "not explained", []).append(f"`{test.rpartition('::')[2]}`")
        said = [f"{', '.join(dict.fromkeys(tests))}: {why}" for why, tests in whys.items()]
        said += [f"{count} refused: {why.partition(';')[0]}" for why, count in suite["not_accelerated"].items()]
        cells = [name, *counts, str(len(suite["differences"])), str(suite["accelerated"])]
        cells += [str(suite["attention_calls"]), "; ".join(said) or "–"]
        lines.append("| " + " | ".join(cells) + " |")
    total = [sum(suite["wrapped"].get(kind, 0) for suite in results["families"].values()) for kind in KINDS]
    differ = sum(len(suite["differences"]) for suite in results["families"].values())
    counted = ", ".join(f"{count} {kind}" for count, kind in zip(total, KINDS, strict=True))
    versions = f"Diffusers {results['diffusers']} and its tests of commit {results['tests_of'][:10]}"
    lines += ["", f"In all: {counted}; {differ} differ. With {versions}, torch {results['torch']}."]
    return "\n".join(lines)


def in_page(page: str, results: dict[str, Any]) -> str:
    """The page with this table in its place."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}"


def _found_before(output: Path, facts: dict[str, str]) -> dict[str, Any]:
    """The other families' results, if they are of the same versions."""
    before = json.loads(output.read_text()) if output.exists() else {}
    return before["families"] if {key: before.get(key) for key in facts} == facts else {}


def _both(checkout: Path, name: str) -> dict[str, Any]:
    """What became of a family's tests, plain and wrapped."""
    start = time.monotonic()
    plain, wrapped = (_run(checkout, SUITES[name], wrap) for wrap in (False, True))
    differences = [
        dict(test=test, plain=before, wrapped=after, message=wrapped["messages"].get(test, ""), why=_why(test))
        for test, before in plain["outcomes"].items()
        if (after := wrapped["outcomes"].get(test, "not run")) != before
    ]
    found = dict(
        files=list(SUITES[name]),
        plain=collections.Counter(plain["outcomes"].values()),
        wrapped=collections.Counter(wrapped["outcomes"].values()),
        accelerated=wrapped["accelerated"],
        attention_calls=wrapped["calls"],
        not_accelerated=wrapped["refused"],
        differences=differences,
        failed_plain=plain["messages"],
        seconds=round(time.monotonic() - start),
    )
    print(name, dict(found["plain"]), dict(found["wrapped"]), f"{len(differences)} differ", flush=True)
    return found


def _why(test: str) -> str:
    return next((why for pattern, why in EXPLAINED if re.search(pattern, test)), "")


def _run(checkout: Path, files: tuple[str, ...], wrap: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        ours = {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
        environment = os.environ | ours | {REPORT: str(report), WRAP: "1" if wrap else ""}
        present = [file for file in files if (checkout / file).exists()]
        options = ["-q", "--timeout=300", "-p", "conformance", "-p", "no:cacheprovider", "-o", "addopts="]
        options.append("--continue-on-collection-errors")
        command = [sys.executable, "-m", "pytest", *options, "-k", LEFT_OUT, *present]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if not report.exists():
            raise SystemExit(f"the tests did not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return json.loads(report.read_text())


# From here on: the plugin.

if REPORT in os.environ:
    import diffusers  # noqa: F401  # the installed one, before the checkout's `conftest.py` puts its own first


class Watched:
    """What happened in one run."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.refused: collections.Counter[str] = collections.Counter()
        self.accelerated = self.calls = 0


watched = Watched()
attached: weakref.WeakSet[Any] = weakref.WeakSet()


def pytest_configure(config: Any) -> None:
    if REPORT in os.environ:
        _stand_in_for_the_hub()
        if os.environ[WRAP]:
            _accelerate_all()


def pytest_runtest_logreport(report: Any) -> None:
    worse = report.failed or (report.skipped and watched.outcomes.get(report.nodeid) != "failed")
    if worse or report.nodeid not in watched.outcomes:
        watched.outcomes[report.nodeid] = report.outcome
    if report.failed:
        lines = str(report.longrepr).strip().splitlines()
        watched.messages[report.nodeid] = next((x[2:] for x in reversed(lines) if x.startswith("E ")), lines[-1])[:300]


def pytest_collectreport(report: Any) -> None:
    if report.failed:  # a file that cannot be imported
        watched.outcomes[report.nodeid] = "failed"
        watched.messages[report.nodeid] = str(report.longrepr).strip().splitlines()[-1][:300]


def pytest_sessionfinish() -> None:
    if REPORT in os.environ:
        Path(os.environ[REPORT]).write_text(json.dumps(vars(watched)))


class Pipe:
    """The little of a pipeline that `accelerate` looks at."""

    def __init__(self, transformer: Any) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer, self.scheduler, self.config = transformer, FlowMatchEulerDiscreteScheduler(), {}

    @property
    def components(self) -> dict[str, Any]:
        return dict(transformer=self.transformer, scheduler=self.scheduler)

    @property
    def device(self) -> Any:
        return self.transformer.device


def _accelerate_all() -> None:
    """Every transformer of a known family, once it has its weights."""
    import diffusers

    from pointillist.accel.models import FAMILIES

    for kind in {getattr(diffusers, name, None) for family in FAMILIES for name in family.CLASSES} - {None}:
        _watch(kind)


def _watch(kind: Any) -> None:
    made, called = kind.__init__, kind.__call__

    @functools.wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        _attach(self)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _attach(self)  # those that were made without weights
        return called(self, *args, **kwargs)

    kind.__init__, kind.__call__ = init, call


def _attach(transformer: Any) -> None:
    import torch

    from pointillist import AccelerateError, Plan, accelerate

    if transformer in attached or torch.compiler.is_compiling():
        return
    if any(weight.device.type == "meta" for weight in transformer.parameters()):
        return
    attached.add(transformer)
    try:
        handle = accelerate(Pipe(transformer), Plan.uniform("pooled", 1.0, block=16))
    except AccelerateError as error:
        watched.refused[str(error)[:200]] += 1
        return

    def count(*call: Any) -> None:
        watched.calls += 1

    handle.observe(count)
    watched.accelerated += 1


def _stand_in_for_the_hub() -> None:
    """Random ones for the tiny text encoders that tests of pipelines load, and tokenizers of single letters."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer, LlamaTokenizer, Qwen2Tokenizer

    def t5() -> Any:  # without dropout, since some tests leave it in training mode
        return transformers.T5Config(
            vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, decoder_start_token_id=0,
            dropout_rate=0.0,
        )  # fmt: skip

    def llama() -> Any:
        config = transformers.LlamaConfig(
            vocab_size=32000, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        return transformers.LlamaForCausalLM(config).eval()

    for tokenizer in {AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer, transformers.Qwen2TokenizerFast}:
        _replace(tokenizer, functools.partial(_letters, 512))
    _replace(CLIPTokenizer, functools.partial(_letters, 77))
    _replace(AutoConfig, t5)
    _replace(transformers.T5EncoderModel, lambda: transformers.T5EncoderModel(t5()).eval())
    _replace(transformers.LlamaForCausalLM, llama)


def _letters(length: int) -> Any:
    """A tokenizer of single letters."""
    import tokenizers
    import transformers

    letters = {letter: i for i, letter in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(32, 127))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )  # fmt: skip


def _replace(kind: Any, make: Any) -> None:
    """`from_pretrained` of a repository of the Hub makes one; of a folder, it loads what is there."""
    fetch = kind.from_pretrained

    def from_pretrained(given: Any, *args: Any, **kwargs: Any) -> Any:
        return fetch(given, *args, **kwargs) if Path(given).exists() else make()

    kind.from_pretrained = from_pretrained


if __name__ == "__main__":
    raise SystemExit(main())
