"""Draw the metrics of a training run: python scripts/plot_training.py runs/X --out X.png; needs matplotlib."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, run_program, say


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--out", type=Path, required=True, help="the picture; .png, which is also added to a name without an ending"
    )
    args = parser.parse_args(argv)

    from wan.training.metrics import METRICS_FILE, draw_metrics, read_metrics

    path = args.run / METRICS_FILE
    rows = read_metrics(path) if path.is_file() else []
    if not rows:
        say(f"error: {path} is not there or has no rows; give the folder of a run")
        return 2
    if importlib.util.find_spec("matplotlib") is None:
        say("error: matplotlib is not there; install it with pip install matplotlib")
        return 2
    try:
        # As matplotlib would, which does not say so.
        out = args.out if args.out.suffix else args.out.with_suffix(".png")
        draw_metrics(rows, out)
    except (OSError, ValueError) as error:
        say(f"error: {args.out} cannot be written ({error}); give a .png in a folder that is there")
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    exit_with(run_program(main))
