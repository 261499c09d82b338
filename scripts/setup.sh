#!/usr/bin/env bash
# Make .venv with everything in requirements.txt, torch first; nothing is done where it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is $("$python" --version); Python 3.11 or newer is needed, set PYTHON to one" >&2
    exit 2
}
done_mark=.venv/installed-requirements.txt
if ! cmp -s requirements.txt "$done_mark"; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet "$(grep '^torch==' requirements.txt)"
    .venv/bin/python -m pip install --quiet -r requirements.txt
    cp requirements.txt "$done_mark"
fi
