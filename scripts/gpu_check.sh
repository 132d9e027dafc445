#!/usr/bin/env bash
# Everything that needs a GPU, in one call, without network, in less than nine minutes; every part has its own limit.
#
#     scripts/gpu_check.sh [FOLDER [PEER_ARCHIVE PEER_SCRIPT]]
#
# Results go to FOLDER. With an archive of vLLM's packages (tar.xz, a folder `site` in it) and the script that runs it,
# vLLM is measured on the same workload in the same call.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
archive=${2:-}
script=${3:-}
mkdir -p "$out"
rm -f "$out"/failed.txt
export PYTHONPATH="$PWD/framework:$PWD/plugins/cpu_ref:$PWD/plugins/cpu_native:$PWD/plugins/cuda_paged:$PWD/plugins/quant:$PWD/server${PYTHONPATH:+:$PYTHONPATH}"
failed=0
run() {
  local name=$1 limit=$2
  shift 2
  echo "== $name (at most $limit s)"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { echo "$name: exit code $code" | tee -a "$out/failed.txt"; failed=1; }
}
engine() { echo python benchmarks/gpu_engine.py --shape "$1" --json "$out/$2.json"; }

run machine 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
run versions 20 python -c 'import torch, triton, transformers; print(torch.__version__, triton.__version__, transformers.__version__)'
run engine_small 75 $(engine qwen3-0.6b engine_small)
run tests 90 python -m pytest -m gpu tests/gpu/test_engine_on_gpu.py tests/gpu -o addopts=--import-mode=importlib -q
run kernels 40 python benchmarks/cuda_attention.py --json "$out/kernels.json"
run quantized 40 python benchmarks/cuda_quant.py --json "$out/quantized.json"
run engine_qwen 45 $(engine qwen3-8b engine_qwen)
run engine_llama 45 $(engine llama-3.1-8b engine_llama)
if [ -n "$archive" ] && [ -n "$script" ]; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  tar -xJf "$archive" -C "$packages"
  peer="--parts peer --peer $script --peer-path $packages/site"
  run vllm_flash 75 $(engine qwen3-0.6b vllm_flash) $peer --peer-backends FLASH_ATTN
  run vllm_triton 75 $(engine qwen3-0.6b vllm_triton) $peer --peer-backends TRITON_ATTN
else
  echo "== vLLM: no archive was given"
fi
if command -v compute-sanitizer > /dev/null; then
  run sanitizer 25 compute-sanitizer --error-exitcode 9 python -m pytest -m gpu tests/gpu -o addopts=--import-mode=importlib -q -k "TestAttentionOnGpu and test_padding"
else
  echo "== sanitizer: compute-sanitizer is not installed"
fi
python benchmarks/gpu_engine.py --table "$out"/engine_*.json "$out"/vllm_*.json | tee "$out/table.txt"
[ "$failed" -eq 0 ] || cat "$out/failed.txt"
exit $failed
