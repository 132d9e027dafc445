#!/usr/bin/env bash
# Everything that needs a GPU, in one call, without network, in less than nine minutes: each part has a limit, and so
# has the whole; what is interrupted still says what it has found, and what finds no time is named.
#
#     [PYTHON=python3] scripts/gpu_check.sh [FOLDER [PEER_ARCHIVE PEER_SCRIPT]]
#
# Nothing has to be installed. What the Python lacks (`scripts/uninstalled.py` names it) is put on PYTHONPATH first.
# Results go to FOLDER, as text and as JSON, written as they come. With an archive of vLLM's packages (tar.xz, a folder
# `site` in it) and the script that runs it, vLLM is measured on the same workload in the same call.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
archive=${2:-}
script=${3:-}
python=${PYTHON:-python3}
deadline=$((SECONDS + 525))
mkdir -p "$out"
rm -f "$out"/failed.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
paths=$("$python" scripts/uninstalled.py "$scratch/metadata") || exit 2
export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=0
fail() { echo "$1" | tee -a "$out/failed.txt"; failed=1; }
run() {
  local name=$1 limit=$2 left=$((deadline - SECONDS))
  shift 2
  [ "$left" -ge 10 ] || { fail "$name: not run, the time is up"; return; }
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name (at most $limit s)"
  timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || fail "$name: exit code $code"
}
engine() { run "$1" "$2" "$python" benchmarks/gpu_engine.py --json "$out/$1.json" --shape "${@:3}"; }
tests() { run "$1" "$2" "${@:4}" "$python" -m pytest -m gpu tests/gpu -o addopts=--import-mode=importlib -W default -q $3; }

run machine 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
run versions 30 "$python" -c 'import torch, triton, transformers; print(torch.__version__, triton.__version__, transformers.__version__)'
engine engine_small 90 qwen3-0.6b
# Compiling kernels takes most of the tests' time: side by side, where pytest can.
workers=$("$python" -c 'import xdist; print("-n 8 --dist worksteal")' 2> /dev/null) || workers=
tests tests 150 "$workers"
run kernels 60 "$python" benchmarks/cuda_attention.py --json "$out/kernels.json"
engine engine_llama 75 llama-3.1-8b
engine engine_qwen 75 qwen3-8b
if [ -n "$archive" ] && [ -n "$script" ]; then
  tar -xJf "$archive" -C "$scratch" || fail "the archive cannot be unpacked"
  for backend in FLASH_ATTN TRITON_ATTN; do
    engine "vllm_$backend" 120 qwen3-0.6b --parts peer --peer "$script" --peer-path "$scratch/site" --peer-backends "$backend" --peer-limit 100
  done
else
  echo "== vLLM: no archive was given"
fi
run quantized 45 "$python" benchmarks/cuda_quant.py --json "$out/quantized.json"
if command -v compute-sanitizer > /dev/null; then
  tests sanitizer 90 "-k test_padding" compute-sanitizer --error-exitcode 9
else
  echo "== sanitizer: compute-sanitizer is not installed"
fi
"$python" benchmarks/gpu_engine.py --table "$out"/engine_*.json "$out"/vllm_*.json | tee "$out/table.txt"
[ "$failed" -eq 0 ] || cat "$out/failed.txt"
exit $failed
