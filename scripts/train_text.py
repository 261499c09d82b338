"""Train the text encoder of `shapes`: python scripts/train_text.py --config configs/training/shapes_text.yaml

A second start goes on where the first was cut. Settings may follow as key=value.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, log_to_stderr, run_program


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so long")
    parser.add_argument("overrides", nargs="*", help="settings that go before those of the file: steps=100")
    args = parser.parse_args(argv)
    log_to_stderr()
    return run_program(train, args, interrupted="interrupted; the last saved state stands")


def train(args: argparse.Namespace) -> int:
    from wan.config.config_files import read_settings
    from wan.shapes.train_text import TextSettings, TextTrainer
    from wan.training.schema import with_overrides
    from wan.training.shutdown import Diverged, Stopped, report_end

    try:
        settings = TextSettings.from_dict(with_overrides(read_settings(args.config), args.overrides))
        # By one process alone: the encoder is small.
        is_done = TextTrainer(settings).run(args.minutes)
    except (Diverged, Stopped) as end:
        return report_end(end)
    print(f"{'trained' if is_done else 'not yet trained in full; start again to go on'}: {settings.out}")
    return 0


if __name__ == "__main__":
    exit_with(main())
