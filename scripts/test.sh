#!/usr/bin/env bash
# Set up and run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
# Compilers of one process at a time: there are more processes than cores already.
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-1}"
# Two at once, each test with one thread; what a file has made for its tests stays with it, the slowest files first.
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
