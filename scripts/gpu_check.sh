#!/usr/bin/env bash
# Everything that needs a GPU, in one call and without network: tests, kernels, engine. Results go to the folder $1.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
mkdir -p "$out"
export PYTHONPATH="$PWD/framework:$PWD/plugins/cpu_ref:$PWD/plugins/cuda_paged:$PWD/plugins/quant:$PWD/server${PYTHONPATH:+:$PYTHONPATH}"
failed=0
run() {
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { echo "$name: exit code $code" | tee -a "$out/failed.txt"; failed=1; }
}
run machine 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
run versions 60 python -c 'import torch, triton, transformers; print(torch.__version__, triton.__version__, transformers.__version__)'
run tests 240 python -m pytest -m gpu tests/cuda_paged -o addopts=--import-mode=importlib -q
run kernels 120 python benchmarks/cuda_attention.py --json "$out/kernels.json"
run compiled 60 python scripts/aot_check.py --arch "$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')"
exit $failed
