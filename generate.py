"""Make videos with Wan or Kandinsky-5 and NABLA: python generate.py --prompt "..." --config nabla_0.7.yaml"""

from __future__ import annotations

import argparse

from wan.observe.console import exit_with, log_to_stderr, run_program
from wan.run.flags import options_of, parse_args, request_of


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, __doc__)
    log_to_stderr()
    return run_program(make, args)


def make(args: argparse.Namespace) -> None:
    """Make what the flags ask for."""
    # Imported after parsing: --help and a mistyped flag should not wait for torch.
    from wan.run.run import run

    run(request_of(args), options_of(args))


if __name__ == "__main__":
    exit_with(main())
