"""Measure which blocks are best kept, and draw it: python scripts/study_attention.py measure|report"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, run_program


def main(argv: list[str] | None = None) -> int:
    return run_program(_main, argv)


def _main(argv: list[str] | None) -> int:
    # Imported here, since that takes seconds, in which the program can be interrupted as well.
    from wan.tools.study.program import main

    return main(argv)


if __name__ == "__main__":
    exit_with(main())
