"""Train a small VAE on the data set `shapes`: python scripts/train_vae.py [--minutes M] [key=value ...]

By several processes under torchrun or accelerate launch.
A second start goes on from the last state. Of the result, in OUT/vae, it prints the quality.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, log_to_stderr, run_program


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="training/shapes_vae.yaml", help="a YAML file")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="save and exit after so many; start again later"
    )
    parser.add_argument("overrides", nargs="*", help="settings that go before those of the file: optimizer.lr=1e-3")
    args = parser.parse_args(argv)
    log_to_stderr()
    return run_program(train, args, interrupted="interrupted; the last state stands")


def train(args: argparse.Namespace) -> int:
    import torch

    from wan.config.config_files import read_settings
    from wan.shapes.train_vae import VaeTrainer
    from wan.shapes.vae_settings import VaeSettings
    from wan.training.schema import with_overrides
    from wan.training.shutdown import Diverged, Stopped, report_end, stop_with_launcher

    stop_with_launcher()
    try:
        settings = VaeSettings.from_dict(with_overrides(read_settings(args.config), args.overrides))
        # Batches are of a few sizes, so the search for the fastest convolutions pays.
        torch.backends.cudnn.benchmark = True
        with contextlib.closing(VaeTrainer(settings)) as trainer:
            trainer.run(args.minutes)
        trainer.accelerator.end_training()
    except (Diverged, Stopped) as end:
        return report_end(end)
    return 0


if __name__ == "__main__":
    exit_with(main())
