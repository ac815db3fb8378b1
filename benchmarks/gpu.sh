#!/usr/bin/env bash
# All that wants a GPU, in under 9 minutes: tests, tuning, attention benchmark. Results land below one folder.
#
#     benchmarks/gpu.sh [FOLDER]      default: benchmarks/results
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
python="${PYTHON:-python3}"
mkdir -p "$out"
unset TRITON_INTERPRET
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" POINTILLIST_CONFIGS="$PWD/$out/kernels_tuned.json"
status=0
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "there is no CUDA device here")' || exit 1

# without conftest.py: it builds pipelines, and this machine may have no diffusers
timeout 150 "$python" -m pytest -q -p no:cacheprovider --noconftest --import-mode=importlib -m gpu tests/kernels/test_gpu.py \
  2>&1 | tee "$out/gpu_tests.log" || status=1
timeout 120 "$python" -m pointillist bench attention --tune --tokens 16384 --density 1,0.25 --no-flex --rounds 3 \
  --output "$out/attention_tuned.json" 2>&1 | tee "$out/gpu_tune.log" || status=1
timeout 240 "$python" -m pointillist bench attention --rounds 3 --output "$out/attention_cuda.json" \
  2>&1 | tee "$out/gpu_attention.log" || status=1
exit $status
