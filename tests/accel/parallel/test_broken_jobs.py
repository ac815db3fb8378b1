"""A process that dies or hangs ends the job on all of them, with a reason."""

import os
import subprocess
import sys

from jobs import TESTS, free_port

SECONDS = 280
"""Until the job has ended: an agreement waits 8 s in these tests, the rest is starting Python on a busy machine."""


def run(how, folder, wait_for=(0, 1)):
    """Exit codes and outputs of the processes that are waited for; the others are killed then."""
    port, started = free_port(), []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        }  # fmt: skip
        with (folder / f"{rank}.txt").open("w") as log:
            command = [sys.executable, str(TESTS / "broken_jobs.py"), how]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.DEVNULL))
    try:
        codes = [started[rank].wait(SECONDS) for rank in wait_for]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return codes, [(folder / f"{rank}.txt").read_text() for rank in range(2)]


def test_a_process_that_dies_ends_the_other_one(tmp_path):
    codes, (first, _) = run("dies", tmp_path)
    assert codes == [1, 9]
    assert first.startswith("ParallelError: another process of this job has ended or does not answer")


def test_a_process_that_hangs_ends_the_other_one(tmp_path):
    codes, (first, _) = run("hangs", tmp_path, wait_for=(0,))
    assert codes == [1]
    assert first.startswith("ParallelError: another process of this job has ended or does not answer")
