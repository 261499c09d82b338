"""Rewrite a checkpoint of Wan from diffusers' layout in the published one, or back, in another dtype or attention."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, run_program, say


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_dir", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--out", required=True, type=Path, help="directory to write; made if it does not exist")
    parser.add_argument("--layout", required=True, choices=("published", "diffusers"), help="of what is written")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; as stored by default"
    )
    parser.add_argument("--sparse_algo", help="attention that it runs with where nothing says else; its own by default")
    args = parser.parse_args(arguments)

    import torch

    from nabla import InputError
    from wan.models.checkpoint import Checkpoint
    from wan.models.wan.convert import convert

    dtype = args.dtype and getattr(torch, args.dtype)
    try:
        not_carried = convert(Checkpoint.open(args.ckpt_dir), args.out, args.layout, dtype, args.sparse_algo)
    except (InputError, OSError) as error:
        say(f"error: {error}")
        return 2
    print(*not_carried, f"wrote {args.out} in the {args.layout} layout", sep="\n")
    return 0


if __name__ == "__main__":
    exit_with(run_program(main))
