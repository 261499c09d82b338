"""Train Wan's transformer: accelerate launch scripts/train.py --config configs/training/X.yaml [key=value ...]

A second start goes on from the last checkpoint. Plain python runs one process.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, log_to_stderr, run_program


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, see docs/training.md")
    parser.add_argument("overrides", nargs="*", help="settings that go before those of the file: optimizer.lr=1e-5")
    args = parser.parse_args(argv)
    log_to_stderr()
    return run_program(
        train, args, interrupted="interrupted; the last whole checkpoint stands, and no half-written one is left"
    )


def train(args: argparse.Namespace) -> int:
    from wan.config.config_files import read_settings
    from wan.training.config import TrainingSettings
    from wan.training.schema import with_overrides
    from wan.training.shutdown import Diverged, Stopped, report_end, stop_with_launcher
    from wan.training.trainer import Trainer

    # Before anything is loaded, so that a launcher that is stopped early takes this process along.
    stop_with_launcher()
    try:
        settings = TrainingSettings.from_dict(with_overrides(read_settings(args.config), args.overrides))
        with contextlib.closing(Trainer(settings)) as trainer:
            trainer.run()
    except (Diverged, Stopped) as end:
        return report_end(end)
    # After `close`, which frees the models: the group of processes ends here.
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    exit_with(main())
