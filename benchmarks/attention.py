"""Sparse against dense attention on this machine; the same as `pointillist bench attention`, kept in results/.

python benchmarks/attention.py [options of `pointillist bench attention`]
"""

import sys
from pathlib import Path

import torch

from pointillist.cli import main

if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(__file__).parent / "results" / f"attention_{device}.json"
    main(["bench", "attention", "--output", str(output), *sys.argv[1:]])
