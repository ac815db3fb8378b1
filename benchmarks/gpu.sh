#!/usr/bin/env bash
# All that wants a GPU, in under 9 minutes: tests, tuning, attention benchmark. Results land below one folder.
#
#     benchmarks/gpu.sh [FOLDER]      default: benchmarks/results
#
# Needs torch, triton, pytest, typer and rich; no diffusers.
set -uo pipefail
mkdir -p "${1:-$(dirname "$0")/results}"
out="$(realpath "${1:-$(dirname "$0")/results}")"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
unset TRITON_INTERPRET
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" POINTILLIST_CONFIGS="$out/kernels_tuned.json"
status=0
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "there is no CUDA device here")' || exit 1

# without conftest.py: it builds pipelines, and this machine may have no diffusers
timeout 150 "$python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . --noconftest --import-mode=importlib \
  tests/kernels/test_gpu.py 2>&1 | tee "$out/gpu_tests.log" || status=1
timeout 150 "$python" -m pointillist bench attention --tune --tokens 16384 --density 1,0.25 --no-flex --rounds 3 \
  --output "$out/attention_tuned.json" 2>&1 | tee "$out/gpu_tune.log" || status=1
timeout 220 "$python" -m pointillist bench attention --rounds 3 --output "$out/attention_cuda.json" \
  2>&1 | tee "$out/gpu_attention.log" || status=1
exit $status
