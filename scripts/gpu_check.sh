#!/usr/bin/env bash
# Everything that needs a GPU, in one call, without network, in less than nine minutes: each part has a limit, and so
# has the whole; what is interrupted still says what it has found, and what finds no time is named.
#
#     [PYTHON=python3] scripts/gpu_check.sh [FOLDER [PEER_ARCHIVE PEER_SCRIPT]]
#
# Nothing has to be installed. What the Python lacks (`scripts/uninstalled.py` names it) is put on PYTHONPATH first.
# Results go to FOLDER, as text and as JSON, written as they come; summary.json has all of them, and the table is the
# last that is printed. With an archive of vLLM's packages (tar.xz, a folder `site` in it) and the script that runs it,
# vLLM is measured on the same workload in the same call, its FlashAttention beside our kernel, and packages that the
# Python lacks are taken from there.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
archive=${2:-}
script=${3:-}
python=${PYTHON:-python3}
deadline=$((SECONDS + 515))
if [ -n "$archive" ] && { [ ! -f "$archive" ] || [ ! -f "$script" ]; }; then
  echo "no file: '$archive' or '$script'" >&2
  exit 2
fi
mkdir -p "$out" || exit 2
rm -f "$out"/{failed.txt,parts.txt,summary.json,table.txt} "$out"/*.json
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0
fail() { echo "$1" | tee -a "$out/failed.txt"; failed=1; }
run() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) began=$SECONDS
  shift 2
  [ "$left" -ge 10 ] || { fail "$name: not run, the time is up"; return; }
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name (at most $limit s)"
  timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  local code=${PIPESTATUS[0]}
  echo "$name $((SECONDS - began)) $code" >> "$out/parts.txt"
  [ "$code" -eq 0 ] || fail "$name: exit code $code"
}
engine() { run "$1" "$2" "$python" benchmarks/gpu_engine.py --json "$out/$1.json" --shape "${@:3}"; }
tests() { run "$1" "$2" "${@:4}" "$python" -m pytest -m gpu tests/gpu -o addopts=--import-mode=importlib -W default -q $3; }
peer() {
  local limit=$((deadline - SECONDS < 115 ? deadline - SECONDS : 115))
  engine "vllm_$1" "$limit" qwen3-0.6b --parts peer --peer "$script" --peer-path "$scratch/site" --peer-backends "$1" \
    --peer-limit $((limit - 15))
}

[ -z "$archive" ] || run unpack 60 tar -xJf "$archive" -C "$scratch"
[ ! -d "$scratch/site" ] || export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$scratch/site"
paths=$("$python" scripts/uninstalled.py "$scratch/metadata") || exit 2
export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
run machine 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
run versions 30 "$python" -c 'import torch, triton, transformers; print(torch.__version__, triton.__version__, transformers.__version__)'
engine engine_small 90 qwen3-0.6b
# Compiling kernels takes most of the tests' time: side by side, where pytest can.
workers=$("$python" -c 'import xdist; print("-n 8 --dist worksteal")' 2> /dev/null) || workers=
tests tests 150 "$workers"
run kernels 60 "$python" benchmarks/cuda_attention.py --json "$out/kernels.json"
if [ -d "$scratch/site" ]; then
  peer FLASH_ATTN
  peer TRITON_ATTN
else
  echo "== vLLM: no archive was given"
fi
engine engine_llama 75 llama-3.1-8b
engine engine_qwen 75 qwen3-8b
run quantized 45 "$python" benchmarks/cuda_quant.py --json "$out/quantized.json"
if command -v compute-sanitizer > /dev/null; then
  tests sanitizer 90 "-k test_padding" compute-sanitizer --error-exitcode 9
else
  echo "== sanitizer: compute-sanitizer is not installed"
fi
"$python" scripts/gpu_table.py "$out" | tee "$out/table.txt"
exit $failed
