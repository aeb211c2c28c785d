#!/usr/bin/env bash
# Everything that waits for a GPU, in one call of under ten minutes, without a network:
#   OUT=/path/for/results bash bench/gpu.sh
# Builds against the torch that is installed, runs the tests that need a device, looks for bad memory accesses and
# races, then times. Writes $OUT/gpu.json and $OUT/log; gpu.json says which steps failed. A step that fails or runs
# out of its time stops no other. Wheels of peers in bench/peers/ are used where they are there. Without a GPU the
# same steps run as far as they can, at small sizes.
# PYTHON: the interpreter, an absolute path or a name (python3); BUDGET: seconds in all (560).
set -uo pipefail
: "${OUT:?set OUT to a folder for the results}" "${PYTHON:=python3}" "${BUDGET:=560}"
REPO="$(cd "$(dirname "$0")/.." && pwd)"
BENCH_SHARE=$((BUDGET / 2)) # seconds that nothing before the benches may use
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
WORK="$(mktemp -d)" # the build, and away from the sources, so that the installed package is the one that runs
trap 'rm -rf "$WORK"' EXIT
export PATH="$PATH:/usr/local/cuda/bin" PYTHONPATH="$WORK/site"
export PYENGINE_CUDA=ON HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
STEPS=()

left() { echo $((BUDGET - SECONDS)); }

step() { # NAME SECONDS COMMAND...: runs it within its time and notes how it ended
  local name=$1 limit=$2 most code=0
  shift 2
  most=$(($(left) - BENCH_SHARE))
  if ((limit > most)); then limit=$most; fi
  echo "=== $name (at most $limit s, $(left) s left)"
  if ((limit > 0)); then timeout --kill-after=5 "$limit" "$@" || code=$?; else code=124; fi
  if ((code == 124)); then echo "$name: out of time"; fi
  echo "=== $name: exit code $code"
  STEPS+=(--step "$name=$code")
  return "$code"
}

tests() { "$PYTHON" -m pytest -q -p no:cacheprovider -c "$REPO/pyproject.toml" --rootdir "$REPO" "$@"; }

sanitize() {
  if ! command -v compute-sanitizer; then
    echo "compute-sanitizer is not installed: memory accesses were not checked"
    return 127
  fi
  # uncached: in a block of the caching allocator, one tensor's end is inside another
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" "$REPO/bench/sanitize.py"
}

install() {
  "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --target "$WORK/site" -C "build-dir=$WORK/build" "$REPO"
}

peers() {
  "$PYTHON" -m pip install --quiet --no-deps --no-index --target "$WORK/site" "$REPO"/bench/peers/*.whl
}

main() {
  cd "$WORK" || exit
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no GPU here"
  step build 200 bash -c install
  if compgen -G "$REPO/bench/peers/*.whl" >/dev/null; then step peers 60 bash -c peers; fi
  step info 60 "$PYTHON" -m pyengine info
  "$PYTHON" -c 'import pyengine._C; print("runs", pyengine._C.__file__)'
  step test_cuda 120 bash -c 'tests "$REPO/tests/test_cuda.py"'
  step test_triton 150 bash -c 'tests "$REPO/tests/test_triton.py" "$REPO/tests/test_triton_trees.py"'
  step test_tilt 60 bash -c 'tests "$REPO/tests/test_tilt.py" -k "opcheck or graph_breaks or equals_the_reference"'
  step memcheck 80 bash -c 'sanitize memcheck'
  step racecheck 80 bash -c 'sanitize racecheck'
  local where=(--device cuda)
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || where=(--device cpu --small)
  timeout --kill-after=5 $(($(left) - 5)) "$PYTHON" "$REPO/bench/gpu.py" --out "$OUT/gpu.json" "${where[@]}" \
    --budget $(($(left) - 30)) "${STEPS[@]}"
}

export -f tests sanitize install peers
export REPO WORK PYTHON
main 2>&1 | tee "$OUT/log"
