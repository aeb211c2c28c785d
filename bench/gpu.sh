#!/usr/bin/env bash
# Everything that waits for a GPU, in one call of under ten minutes, without a network:
#   OUT=/path/for/results bash bench/gpu.sh
# Builds against the torch that is installed, runs the tests that need a device, then the benches, and
# writes $OUT/*.json and $OUT/log. Commit what it measured to bench/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?set OUT to a folder for the results}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  python3 -m pip install --quiet --no-build-isolation --no-deps --target "$OUT/site" .
  export PYTHONPATH="$OUT/site"
  cd "$(mktemp -d)" # away from the sources, so that the installed package is the one that runs
  python3 -m pyengine info
  python3 -m pytest -q "$OLDPWD/tests/test_cuda.py" "$OLDPWD/tests/test_tilt.py" -c "$OLDPWD/pyproject.toml" \
    --rootdir "$OLDPWD"
  python3 -m pytest -q "$OLDPWD/bench/bench_tilt.py" -c "$OLDPWD/pyproject.toml" --rootdir "$OLDPWD" \
    --benchmark-json="$OUT/tilt_raw.json"
  cp "$OLDPWD/bench/results/tilt.json" "$OUT/tilt.json"
} 2>&1 | tee "$OUT/log"
rm -rf "$OUT/site"
