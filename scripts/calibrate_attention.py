"""Measure what layers lose and save at several shares of their blocks, and solve for a profile."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, run_program


def main() -> int:
    return run_program(
        _main, interrupted="interrupted; what is measured is kept, and the same command goes on from there"
    )


def _main() -> int:
    # Imported here, since that takes seconds, in which the program can be interrupted as well.
    from wan.tools.calibrate_attention.program import main

    return main()


if __name__ == "__main__":
    exit_with(main())
