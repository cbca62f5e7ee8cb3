#!/usr/bin/env bash
# A quarter of an hour on a GPU: `benchmarks/on_gpu.sh 1`, then `benchmarks/on_gpu.sh 2`.
# Needs torch, Triton and pytest; no package index, git or make. See benchmarks/on_gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if ! "$python" -c "import grpo_fused.kernels.launch" 2> /dev/null; then
  # Where pip cannot install the package, links serve. Not the checkout itself: on the path its folder
  # `kernels` would be taken for the package of that name, and tests/conftest.py removes it.
  [ -e grpo_fused/kernels ] || ln -s ../kernels grpo_fused/kernels
  mkdir -p runs/site
  [ -e runs/site/grpo_fused ] || ln -s ../../grpo_fused runs/site/grpo_fused
  export PYTHONPATH="$PWD/runs/site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" -m benchmarks.on_gpu "$@"
