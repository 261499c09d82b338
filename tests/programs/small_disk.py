"""generate.py where no file may grow beyond some bytes, as by a quota or on a disk that fills up. Arguments: the bytes,
and generate.py's own."""

from __future__ import annotations

import resource
import sys

import generate
from wan.observe.console import exit_with

if __name__ == "__main__":
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    exit_with(generate.main(sys.argv[2:]))
