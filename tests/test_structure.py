"""Imports go one way, and `import pointillist` is light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pointillist"
FOR_ALL = {"files", "metrics"}
MAY_IMPORT = {
    "files": set(),
    "metrics": set(),
    "kernels": set(),
    "hardware": set(),
    "accel": {"kernels", "hardware"},
    "integrations": {"kernels", "accel"},
    "search": {"kernels", "hardware", "accel"},
    "pipelines": {"kernels", "hardware", "accel", "search"},
    "web": {"hardware", "accel", "search", "pipelines", "metrics"},
    "cli": {"kernels", "hardware", "accel", "search", "pipelines", "web"},
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem in FOR_ALL)


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "pointillist" and len(parts) > 1:
            assert parts[1] in MAY_IMPORT[room] | FOR_ALL | {room}, f"{path} imports {module}"


def test_private_names_of_diffusers_stay_in_the_bridge():
    for path in FILES:
        text = path.read_text()
        if path.name != "bridge.py":
            assert "_AttentionBackendRegistry" not in text and "._attention_backend" not in text, path


def test_everything_that_is_not_code_is_in_the_package():
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {
        file
        for package, patterns in listed.items()
        for pattern in patterns
        for file in (PACKAGE.parent / package.replace(".", "/")).glob(pattern.replace("**", "**/*"))
    }
    files = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert files and files <= packaged


def test_import_loads_no_torch():
    code = "import sys, pointillist; print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert answer.stdout.strip() == "[]"


def test_unknown_public_names_are_told():
    import pointillist

    with pytest.raises(AttributeError, match="accelerate"):
        pointillist.accelerated  # noqa: B018
