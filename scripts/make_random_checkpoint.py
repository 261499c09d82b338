"""Write a checkpoint with random weights, to try full-size runs without the real ones."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, run_program, say

NANO = ("nano", "i2v-nano", "flf2v-nano", "vace-nano", "t2v-A14B-nano", "i2v-A14B-nano", "ti2v-5B-nano")
REAL = ("t2v-1.3B", "t2v-14B", "i2v-14B", "flf2v-14B", "vace-1.3B", "vace-14B", "t2v-A14B", "i2v-A14B", "ti2v-5B")
WAN = NANO + REAL
KANDINSKY = ("kandinsky5-nano", "kandinsky5-lite", "kandinsky5-pro")


def write_wan(args: argparse.Namespace) -> None:
    import torch

    from nabla import InputError, NablaConfig
    from wan.models.wan import random_checkpoint

    if args.layout != "published" or args.file_name is not None:
        raise InputError(f"--layout diffusers and --file_name are not for {args.model}; leave them out")
    if args.sparse_algo is not None:
        NablaConfig.parse(args.sparse_algo)
    random_checkpoint.write(args.model, args.out, getattr(torch, args.dtype), args.sparse_algo, args.seed)


def write_kandinsky(args: argparse.Namespace) -> None:
    import torch

    from wan.models.kandinsky import random_checkpoint

    dtype = getattr(torch, args.dtype)
    random_checkpoint.write(args.model, args.out, dtype, args.layout, args.file_name, args.sparse_algo, args.seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, choices=(*WAN, *KANDINSKY))
    parser.add_argument("--out", required=True, type=Path, help="directory to write; made if it does not exist")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the transformer")
    parser.add_argument("--layout", choices=("published", "diffusers"), default="published", help="Wan's: published")
    parser.add_argument("--file_name", help="of Kandinsky's transformer, without .safetensors, as it was published")
    parser.add_argument("--sparse_algo", help="attention that the checkpoint names as its own, such as nabla-0.7")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from nabla import InputError

    try:
        (write_wan if args.model in WAN else write_kandinsky)(args)
    except (InputError, OSError) as error:
        say(f"error: {error}")
        return 2
    print(f"wrote a random {args.model} checkpoint to {args.out}")
    return 0


if __name__ == "__main__":
    exit_with(run_program(main))
