"""Compute latents and text states of a dataset once: accelerate launch scripts/prepare_data.py --config X.yaml

A second start makes what is missing. Each process that accelerate launches makes shards of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, log_to_stderr, run_program


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, see docs/training.md")
    parser.add_argument("overrides", nargs="*", help="settings that go before those of the file: out=data/train")
    # Flags are read before torch is imported, so that --help and a wrong flag take no seconds.
    args = parser.parse_args(argv)
    log_to_stderr()
    return run_program(make, args, interrupted="interrupted; start again to make what is missing")


def make(args: argparse.Namespace) -> int:
    import torch
    from accelerate import PartialState

    from wan.config.config_files import read_settings
    from wan.tools.datasets import open_dataset
    from wan.training.encoder import Encoder
    from wan.training.models import open_components
    from wan.training.prepare import prepare
    from wan.training.prepare_settings import PrepareSettings
    from wan.training.schema import with_overrides
    from wan.training.shutdown import stop_with_launcher

    stop_with_launcher()
    settings = PrepareSettings.from_dict(with_overrides(read_settings(args.config), args.overrides))
    source = open_dataset(settings.dataset, settings.options)
    # Joins the processes that a launcher started, on CPUs by gloo.
    processes = PartialState(cpu=not torch.cuda.is_available())
    vae_dtype = getattr(torch, settings.vae_dtype)
    checkpoint = open_components(settings.checkpoint, components=settings.components)
    encoder = Encoder(checkpoint, processes.device, vae_dtype, settings.whole_clips)
    done = prepare(source, settings, encoder, processes.process_index, processes.num_processes)
    print(f"process {processes.process_index}: {done.clips} clips in {settings.out}, {done.skipped} samples skipped")
    processes.destroy_process_group()
    return 0


if __name__ == "__main__":
    exit_with(main())
