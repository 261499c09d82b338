"""A script of training where no file may grow beyond some bytes, as on a disk that fills up. Arguments: the bytes, the
script, and its own."""

from __future__ import annotations

import importlib
import resource
import sys

from wan.observe.console import exit_with

if __name__ == "__main__":
    limit = int(sys.argv[1])
    script = importlib.import_module(f"scripts.{sys.argv[2]}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    exit_with(script.main(sys.argv[3:]))
