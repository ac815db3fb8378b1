"""Pools of threads that each compute alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def thread_pool(threads: int) -> ThreadPoolExecutor:
    """The pool of so many threads; torch's operators use one core in each."""
    with _pools_lock:
        if threads not in _pools:
            # set_num_threads in a worker also moves the default of threads born later, so all workers are
            # started here and the caller's number is put back.
            gate = threading.Barrier(threads + 1)
            pool = ThreadPoolExecutor(threads, "pointillist", initializer=torch.set_num_threads, initargs=(1,))
            started = [pool.submit(gate.wait) for _ in range(threads)]
            gate.wait()
            for future in started:
                future.result()
            torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]
