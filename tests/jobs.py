"""Jobs of several processes on one machine: one start serves many cases, since starting costs most."""

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parent


def run_job(processes: int, module: str, names: list[str], folder: Path, seconds: float = 1200) -> dict:
    """Run `module.run_case(name)` for every name in each of so many processes, and give what rank 0 returned, by name;
    an exception's text where one was raised. Raises AssertionError if the job does not end in time."""
    port = free_port()
    started = []
    for rank in range(processes):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        }  # fmt: skip
        command = [sys.executable, str(TESTS / "jobs.py"), module, str(folder), *names]
        log = (folder / f"log{rank}.txt").open("w")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + seconds
    try:
        codes = [process.wait(max(1, deadline - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = "\n".join((folder / f"log{rank}.txt").read_text()[-3000:] for rank in range(processes))
    assert codes == [0] * processes, f"exit codes {codes}\n{logs}"
    return torch.load(folder / "results.pt", weights_only=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    import importlib
    import traceback

    import torch.distributed as dist

    from pointillist.accel.parallel.start import join

    module, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    join(torch.device("cpu"))
    cases, results = importlib.import_module(module), {}
    for name in names:
        try:
            results[name] = cases.run_case(name)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
            print(name, flush=True)
            traceback.print_exc()
        dist.barrier()
    if dist.get_rank() == 0:
        torch.save(results, Path(folder) / "results.pt", pickle_protocol=pickle.HIGHEST_PROTOCOL)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
