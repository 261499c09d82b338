#!/usr/bin/env bash
# Make .venv with everything in requirements.txt, torch first; nothing is done where it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is $("$python" --version); Python 3.11 or newer is needed, set PYTHON to one" >&2
    exit 2
}

install() {
    "$1/bin/python" -m pip install --quiet "$(grep '^torch==' requirements.txt)"
    "$1/bin/python" -m pip install --quiet -r requirements.txt
}

# One set-up at a time. The lock belongs to this shell's open file, so it outlasts the Python that takes it, and goes
# when the shell and all that it started have ended, in whatever way.
exec 9> .venv.lock
lock() { "$python" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | $1)" 2> /dev/null; }
lock fcntl.LOCK_NB || {
    echo "another set-up runs in $PWD; waiting for its end" >&2
    lock 0
}

# Of an environment of its own: a Python that was only linked there would install into the machine's.
works() {
    "$1/bin/python" -c 'import sys, pip; sys.exit(sys.prefix == sys.base_prefix)' > /dev/null 2>&1
}

done_mark=installed-requirements.txt
if ! cmp -s requirements.txt ".venv/$done_mark"; then
    if works .venv; then
        # A cut leaves it without its mark, and the next start installs what is missing.
        rm -f ".venv/$done_mark"
        install .venv
    else
        # Built aside, so that a .venv is never half there; one that a cut left goes on, once it has a pip.
        aside=.venv.partial
        if [ ! -e "$aside/has-pip" ]; then
            rm -rf "$aside"
            "$python" -m venv "$aside"
            touch "$aside/has-pip"
        fi
        install "$aside"
        # Programs of packages begin with the path of their Python.
        grep -rlIF "$PWD/$aside" "$aside/bin" "$aside/pyvenv.cfg" | while IFS= read -r file; do
            "$python" - "$file" "$PWD/$aside" "$PWD/.venv" <<'P'
import sys
from pathlib import Path

file, before, after = sys.argv[1:]
text = Path(file).read_bytes()
Path(file).write_bytes(text.replace(before.encode(), after.encode()))
P
        done
        rm -rf .venv
        mv "$aside" .venv
    fi
    cp requirements.txt ".venv/$done_mark"
fi
