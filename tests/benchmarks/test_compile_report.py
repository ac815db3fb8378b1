"""The kernels compile for six GPUs without one. In processes of their own: this one interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": str(ROOT)}

pytest.importorskip("triton", reason="triton has no build for this platform")


@pytest.mark.timeout(1500)
def test_every_configuration_compiles_well_for_every_architecture(tmp_path):
    """No spills, shared memory within the limit, matrix instructions of that architecture: the report's exit code."""
    output = tmp_path / "compile.json"
    command = [sys.executable, ROOT / "benchmarks" / "compile_report.py", "--output", output]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    rows = json.loads(output.read_text())["rows"]
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    table = json.loads((ROOT / "pointillist/kernels/triton/configs.json").read_text())
    compiled = {
        (row["architecture"], f"{row['head_dim']}/{row['bits']}/{row['kind'].split()[0]}")
        for row in rows
        if row["kernel"] == "block_sparse"
    }
    assert compiled == {(name, key) for name, keys in table.items() if name != "interpreter" for key in keys}


def test_the_report_sees_what_is_wrong():
    """Tiles too large: registers spill, and shared memory is not there."""
    code = """
import sys; sys.path.insert(0, "benchmarks")
import compile_report as report
from pointillist.kernels.triton.configs import Config
report.shipped = lambda: {"sm_89": {"128/16/runs": Config(128, 128, 4, 4)}}
print(report.examine(report.attention_cases("sm_89")[0])["faults"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "spills" in done.stdout and "shared memory" in done.stdout
