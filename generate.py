"""Generate a video with Wan2.1 and NABLA attention: python generate.py --prompt "..." --config nabla_0.7.yaml"""

from __future__ import annotations

import argparse

from wan.observe.console import exit_with, log_to_stderr, run_program
from wan.run.flags import ABOUT_SMALL, SMALL_CHECKPOINT, TASKS, flag_settings, parse_args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, __doc__)
    log_to_stderr()
    return run_program(make, args)


def make(args: argparse.Namespace) -> None:
    """Make what the flags ask for."""
    # Imported after parsing: --help and a mistyped flag should not wait for torch.
    from wan.memory.budget import parse_memory
    from wan.run.making import Options
    from wan.run.run import Request, run

    options = Options(
        device=args.device,
        offload=args.offload_model,
        t5_cpu=args.t5_cpu,
        compile=args.compile,
        replicas=args.replicas,
        cfg_size=args.cfg_size,
        ulysses_size=args.ulysses_size,
        dit_fsdp=args.dit_fsdp,
        t5_fsdp=args.t5_fsdp,
        memory=None if args.memory is None else parse_memory(args.memory),
        log=args.log_file,
        report=args.report,
        overwrite=args.overwrite,
    )
    request = Request(
        flag_settings(args),
        config=args.config,
        task=args.task,
        default_checkpoint=SMALL_CHECKPOINT if args.task is None else TASKS[args.task],
        about_default=ABOUT_SMALL if args.task is None else None,
        save_file=args.save_file,
        prompt_file=args.prompt_file,
        save_dir=args.save_dir,
    )
    run(request, options)


if __name__ == "__main__":
    exit_with(main())
