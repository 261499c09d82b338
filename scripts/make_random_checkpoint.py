"""Write a checkpoint with random weights in the published layout, to try full-size runs without the real ones."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, run_program, say


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, choices=("nano", "t2v-1.3B", "t2v-14B"))
    parser.add_argument("--out", required=True, type=Path, help="directory to write; made if it does not exist")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the transformer")
    parser.add_argument("--sparse_algo", help="attention that the checkpoint names as its own, such as nabla-0.7")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch

    from nabla import InputError, NablaConfig
    from wan.models.wan import random_checkpoint

    try:
        if args.sparse_algo is not None:
            NablaConfig.parse(args.sparse_algo)
        random_checkpoint.write(args.model, args.out, getattr(torch, args.dtype), args.sparse_algo, args.seed)
    except (InputError, OSError) as error:
        say(f"error: {error}")
        return 2
    print(f"wrote a random {args.model} checkpoint to {args.out}")
    return 0


if __name__ == "__main__":
    exit_with(run_program(main))
