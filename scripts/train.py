"""Train Wan's transformer: accelerate launch scripts/train.py --config configs/training/X.yaml [key=value ...]

A second start goes on from the last checkpoint. Plain python runs one process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STOPPED = 143


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, see docs/training.md")
    parser.add_argument("overrides", nargs="*", help="settings that go before those of the file: optimizer.lr=1e-5")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)

    from nabla import InputError
    from wan.config import read_settings
    from wan.training.config import TrainingSettings
    from wan.training.schema import with_overrides
    from wan.training.stopping import Diverged, Stopped, stop_with_launcher
    from wan.training.trainer import Trainer

    stop_with_launcher()
    try:
        settings = TrainingSettings.from_dict(with_overrides(read_settings(args.config), args.overrides))
        with contextlib.closing(Trainer(settings)) as trainer:
            trainer.run()
    except (InputError, Diverged, Stopped) as error:
        print(f"error: {error}" if not isinstance(error, Stopped) else error, file=sys.stderr)
        return {Diverged: 1, Stopped: STOPPED}.get(type(error), 2)
    except KeyboardInterrupt:
        print("interrupted; the last whole checkpoint stands, and no half-written one counts", file=sys.stderr)
        return 130
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
