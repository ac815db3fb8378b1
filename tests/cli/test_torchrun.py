"""`torchrun … -m pointillist generate` on the embedded model: the clip of one process, written by the first of two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import free_port
from pointillist.metrics import compare
from pointillist.pipelines.video import read_clip

ROOT = Path(__file__).parents[2]
WORDS = (
    "generate", "a red circle moving left on black", "--width", "64", "--height", "64", "--frames", "17", "--steps",
    "5", "--seed", "3", "--json",
)  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(folder, name, *words, processes=1):
    """The finished command, and the clip's path."""
    output = folder / f"{name}.mp4"
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port()), "-m"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, "pointillist", *WORDS, *words, "--output", str(output)], env=environment, capture_output=True,
        text=True, check=False, cwd=folder, timeout=1000,
    )  # fmt: skip
    return done, output


@pytest.mark.parametrize("how", [("--ulysses", "2"), ("--ring", "2")])
def test_two_processes_make_the_clip_of_one(tmp_path, how):
    pattern = ("--pattern", "radial", "--density", "0.4", "--tail", "none")
    alone, one = run(tmp_path, "one", *pattern)
    assert alone.returncode == 0, alone.stderr
    split, two = run(tmp_path, "two", *pattern, *how, processes=2)
    assert split.returncode == 0, split.stderr
    facts, expected = json.loads(split.stdout), json.loads(alone.stdout)  # the first process alone speaks
    assert facts["processes"] == {"ulysses": 1, "ring": 1, how[0].removeprefix("--"): 2}
    for name in ("tokens", "plan", "steps_run", "seed"):
        assert facts[name] == expected[name]
    assert facts["density"] == pytest.approx(expected["density"], abs=1e-3)
    found = compare(read_clip(one), read_clip(two)).psnr
    assert found == 100 if how[0] == "--ulysses" else found > 60  # a ring rounds otherwise, and a pixel may too


def test_degrees_that_do_not_fit_the_job(tmp_path):
    done, output = run(tmp_path, "wrong", "--ulysses", "2")
    assert done.returncode == 2 and "torchrun --nproc-per-node 2" in done.stderr
    done, output = run(tmp_path, "wrong", processes=2)
    assert done.returncode != 0 and "torchrun started 2 processes, and --ulysses 1 times --ring 1 is 1" in done.stderr
    assert not output.exists()
