"""What machine this is."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any


def detect() -> dict[str, Any]:
    """Processor, cores that may be used, memory in GiB, and every CUDA device."""
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [{"name": d.name, "memory_gib": round(d.total_memory / 2**30, 1)} for d in devices],
    }


def machine_name(device: Any) -> str:
    """Twelve letters for this machine, a device of it and the number of threads: what measured times hold for."""
    import torch

    facts = detect()
    about = [facts["processor"], facts["cores"], facts["gpus"], str(device), torch.get_num_threads()]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:12]


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
