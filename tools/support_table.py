"""What works with which model family: runs the tests of tiny pipelines, and writes what they found.

python tools/support_table.py                    # all of them, some minutes; then the table in docs/models.md
python tools/support_table.py --junit FILE.xml   # of a run that was made: pytest -m "slow or not slow" --junitxml=…
python tools/support_table.py --table            # the table anew, of benchmarks/results/support.json
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = sorted((ROOT / "tests" / "accel").glob("test_families_*.py"))
RESULTS = ROOT / "benchmarks" / "results" / "support.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- {}: written by tools/support_table.py -->", "<!-- end of the {} -->"

COLUMNS = {
    "sparse": (
        "test_the_sites_are_all_self_attentions",
        "test_density_one_and_restoring_are_exact",
        "test_sparse_output_equals_a_masked_reference",
        "test_prompts_of_unequal_length",
        "test_what_is_learned_of_a_dense_step_sees_no_padding",
        "test_dynamic_patterns_run_everywhere",
        "test_two_shapes_in_a_row_and_callbacks",
        "test_save_and_load_after_restoring",
        "test_what_has_no_sparse_attention_says_why",
    ),
    "cache": ("test_steps_are_cached",),
    "regions": ("test_regions",),
    "compile": ("test_compiled",),
    "offload": ("test_offloading",),
    "context parallel": ("test_context_parallel",),
    "LoRA": ("test_lora",),
    "fp8 storage": ("test_layerwise_casting",),
}
"""The tests that a column stands for."""


def outcomes(*junit: Path) -> dict[tuple[str, str], list[str]]:
    """(test, its parameters) → what became of it: "yes", the reason of a skip, or "fails". Later files count."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in junit:
        for case in ElementTree.parse(file).iter("testcase"):
            test, _, parameters = case.get("name", "").rstrip("]").partition("[")
            skip, bad = case.find("skipped"), any(case.find(kind) is not None for kind in ("failure", "error"))
            found[test, parameters] = ["fails" if bad else "yes" if skip is None else str(skip.get("message"))]
    return found


def cell(found: dict[tuple[str, str], list[str]], column: str, name: str) -> str:
    """What a column says of a variant: "yes", "fails", or why it was not tried."""
    seen = [
        each
        for (test, parameters), became in found.items()
        if test in COLUMNS[column] and _is_of(parameters, name)
        for each in became
    ]
    if _only_refused(found, name) and column != "cache":
        return "no" if column == "sparse" else "–"
    others = [each for each in seen if each != "yes"]
    return others[0] if others else "yes" if seen else "not tried"


def _only_refused(found: dict[tuple[str, str], list[str]], name: str) -> bool:
    """Whether the one thing to show was that sparse attention is refused."""
    return found.get(("test_what_has_no_sparse_attention_says_why", name)) == ["yes"]


def _is_of(parameters: str, name: str) -> bool:
    """Variants' names hold dashes, and may begin others': `wan`, `wan-vace`."""
    from families import PIPELINES, WITHOUT

    fits = [each for each in (*PIPELINES, *WITHOUT) if parameters == each or f"-{parameters}-".find(f"-{each}-") >= 0]
    return bool(fits) and max(fits, key=len) == name


def rows(*junit: Path) -> list[dict[str, Any]]:
    """One for every tiny pipeline."""
    from families import PIPELINES, WITHOUT, Family
    from pointillist.accel.models import family_of

    found, made = outcomes(*junit), []
    for name in (*PIPELINES, *WITHOUT):
        pipe = Family(name).pipe
        family = family_of(pipe.transformer)
        assert family is not None, "every tiny pipeline can be cached"
        facts = dict(name=name, family=family.NAME, pipeline=type(pipe).__name__)
        made.append(facts | {column: cell(found, column, name) for column in COLUMNS})
    return made


def table(results: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = ["| model | tried as | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in results["rows"]:
        cells = [row["name"], f"`{row['pipeline']}`", *(row[column] for column in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    summary = f"{results['green']} of {len(results['rows'])} with sparse attention, with {versions}."
    return "\n".join([*lines, "", summary])


def presets() -> str:
    """What families are accelerated with where no plan was searched, in Markdown."""
    from pointillist.accel.models import FAMILIES

    lines = ["| families | density | dense above | least tokens | where the values come from |", "|---" * 5 + "|"]
    for preset in dict.fromkeys(family.PRESET for family in FAMILIES):
        names = ", ".join(family.NAME for family in FAMILIES if preset == family.PRESET)
        values = f"{preset.density} | {preset.dense_above} | {preset.min_tokens} | {preset.source}"
        lines.append(f"| {names} | {values} |")
    return "\n".join(lines)


def in_page(page: str, results: dict[str, Any]) -> str:
    """The page with these tables in their places."""
    for name, text in (("support table", table(results)), ("presets", presets())):
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def run(junit: Path) -> None:
    command = [sys.executable, "-m", "pytest", *map(str, TESTS), "-m", "slow or not slow", f"--junitxml={junit}"]
    subprocess.run(command, cwd=ROOT, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, nargs="+", help="what runs of the tests have written, the last one last")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    given = parser.parse_args()
    if not given.table:
        import diffusers
        import torch

        with tempfile.TemporaryDirectory() as folder:
            junit = given.junit or [Path(folder) / "junit.xml"]
            if given.junit is None:
                run(junit[0])
            found = rows(*junit)
        versions = dict(diffusers=diffusers.__version__, torch=torch.__version__, python=platform.python_version())
        green = sum(row["sparse"] == "yes" for row in found)
        results = dict(versions=versions, green=green, tests={name: list(t) for name, t in COLUMNS.items()}, rows=found)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(in_page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main()
