#!/usr/bin/env bash
# Make .venv with everything in requirements.txt, torch first; nothing is done where it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."
# Without the links on the way here: so the environment writes its own path.
cd -P .
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is $("$python" --version); Python 3.11 or newer is needed, set PYTHON to one" >&2
    exit 2
}

install() {
    "$1/bin/python" -m pip install --quiet --no-compile "$(grep '^torch==' requirements.txt)"
    "$1/bin/python" -m pip install --quiet --no-compile -r requirements.txt
    # Fifteen thousand files: by all cores, where pip takes one. Some packages have files that no Python of today reads.
    "$1/bin/python" -m compileall -qq -j 0 "$1/lib" || true
}

# Of an environment of its own: a Python that was only linked there would install into the machine's.
works() {
    "$1/bin/python" -c 'import sys, pip; sys.exit(sys.prefix == sys.base_prefix)' > /dev/null 2>&1
}

done_mark=installed-requirements.txt
is_done() { cmp -s requirements.txt ".venv/$done_mark" && works .venv; }
# A folder that may only be read can have been set up before.
if is_done; then exit 0; fi

# One set-up at a time. The lock belongs to this shell's open file, so it outlasts the Python that takes it, and goes
# when the shell and all that it started have ended, in whatever way.
exec 9> .venv.lock
lock() {
    "$python" - "$1" <<'P'
import fcntl
import sys

try:
    fcntl.flock(9, fcntl.LOCK_EX | (fcntl.LOCK_NB if sys.argv[1] == "try" else 0))
except BlockingIOError:
    sys.exit(1)
except OSError as error:
    print(f"this folder cannot be locked ({error.strerror}): let no other set-up of it run meanwhile", file=sys.stderr)
P
}
lock try || {
    echo "another set-up runs in $PWD; waiting for its end" >&2
    lock wait
}

# Programs of packages begin with the path of their Python. Each is whole at any time, for a cut may come at any.
move_paths() {
    "$python" - "$1" "$2" <<'P'
import os
import shutil
import sys
from pathlib import Path

aside, place = sys.argv[1:]
before, after = map(os.fsencode, (aside, place))
for file in (Path(aside, "pyvenv.cfg"), *Path(aside, "bin").iterdir()):
    if file.is_symlink() or not file.is_file():
        continue
    text = file.read_bytes()
    if before in text and b"\0" not in text:
        changed = Path(aside, "changed")
        changed.write_bytes(text.replace(before, after))
        shutil.copymode(file, changed)
        os.replace(changed, file)
P
}

if ! is_done; then
    if works .venv; then
        # A cut leaves it without its mark, and the next start installs what is missing.
        rm -f ".venv/$done_mark"
        install .venv
    else
        # Built aside, so that a .venv is never half there; one that a cut left goes on, once it has a pip.
        aside=.venv.partial
        if [ ! -e "$aside/has-pip" ] || ! works "$aside"; then
            rm -rf "$aside"
            "$python" -m venv "$aside"
            touch "$aside/has-pip"
        fi
        install "$aside"
        move_paths "$PWD/$aside" "$PWD/.venv"
        rm -rf .venv
        mv "$aside" .venv
    fi
    cp requirements.txt ".venv/$done_mark"
fi
