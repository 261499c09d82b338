#!/usr/bin/env bash
# Set up, look at style and types, and run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/python -m ruff check
.venv/bin/python -m ruff format --check
# Beside the tests: without a cache it takes some seconds, most of them for torch.
types="$(mktemp)"
trap 'rm -f "$types"' EXIT
.venv/bin/python -m mypy > "$types" 2>&1 &
mypy=$!
# Compilers of one process at a time: there are more processes than cores already.
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-1}"
# Two at once, each test with one thread; what a file has made for its tests stays with it, the slowest files first.
status=0
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
wait "$mypy" || status=$?
cat "$types"
exit "$status"
