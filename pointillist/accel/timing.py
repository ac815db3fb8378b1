"""Moments on a device: the host's clock on CPUs, events on CUDA, so measuring never waits for the device."""

import time

import torch

Moment = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """This moment in the order of the work given to `device`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """Seconds from one moment to a later one on the same device; waits until the later one has come."""
    if isinstance(start, float):
        assert isinstance(end, float), "moments of two kinds of device"
        return end - start
    assert not isinstance(end, float), "moments of two kinds of device"
    end.synchronize()
    return start.elapsed_time(end) / 1000
