"""Compare settings of attention on whole videos: python scripts/evaluate.py --config full.yaml --settings keep-0.2"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, run_program

INTERRUPTED = "interrupted; what is made stays whole, and the same command goes on from there"


def main() -> int:
    return run_program(_main, interrupted=INTERRUPTED)


def _main() -> int:
    # Imported here, since that takes seconds, in which the program can be interrupted as well.
    from wan.tools.evaluate.program import main

    return main()


if __name__ == "__main__":
    exit_with(main())
