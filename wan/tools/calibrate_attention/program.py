"""Measure what each layer of a checkpoint loses and saves at several shares of its blocks, and solve for a profile.

The profile is a small YAML that any config can name, `attention: {profile: FILE}`: by layer and by stretch of steps the
share of blocks that is kept, with the least error of the transformer's output within a budget: --keep, the mean share,
or --seconds, a video's on this card. Measured is on walks of the prompts' videos with dense attention; what is measured
lies beside --out, so that a run that was cut goes on, and other budgets take seconds. See docs/calibration.md. Further
flags are those of generate.py that say what runs and how: --ckpt_dir, --config, --transformer, --lora, --size,
--frame_num, --sample_*, --negative_prompt, --image and the like, --fp8, --dtype, --device, --memory, --offload_model,
--t5_cpu, --compile.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path

from nabla import InputError
from wan.files.video import check_writable
from wan.observe.console import log_to_stderr, positive
from wan.run.flags import Parser
from wan.run.flags import parse_args as parse_run
from wan.tools.calibrate_attention.calibration import Calibration, about_solved
from wan.tools.calibrate_attention.job import open_job
from wan.tools.calibrate_attention.table import check_keep

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
# What generate.py does and this does not.
UNSUPPORTED_FLAGS = """task cache save_dir log_file report cfg_size ulysses_size replicas t5_fsdp dit_fsdp sparse_algo
    mask_refresh expand_prompt""".split()


def main() -> int:
    """Measure, solve and write the profile that the flags ask for. Raises `InputError` for what cannot be."""
    args = parse_args()
    log_to_stderr()
    if args.keep is not None:
        # Before hours of measurements, which it can make no use of.
        check_keep(args.keep, args.shares)
    check_writable(args.out, "--out")
    check_writable(args.measurements, "--measurements")
    if args.plot is not None:
        _check_plot(args.plot)
    calibration = Calibration(open_job(args), args.measurements)
    calibration.measure()
    solved = calibration.solve(args.keep, args.seconds)
    calibration.write(solved, args.out, args.plot)
    print("\n".join([*about_solved(solved), f"wrote {args.out}"]))
    return 0


def parse_args() -> argparse.Namespace:
    """generate.py's flags, and this program's own besides."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_own(parser)
    own, rest = parser.parse_known_args()
    steps = [] if own.steps is None else ["--sample_steps", own.steps]
    args = parse_run([*rest, *steps, "--prompt_file", own.prompt_file])
    for name in UNSUPPORTED_FLAGS:
        if getattr(args, name):
            parser.error(f"--{name} is not for calibrating attention; leave it out")
    mine = vars(own) | {"shares": tuple(sorted(set(own.shares)))}
    if own.measurements is None:
        mine["measurements"] = own.out.with_suffix(".measured.jsonl")
    # The file of prompts as generate.py's flags have it.
    del mine["prompt_file"]
    return argparse.Namespace(**vars(args) | mine)


def _add_own(parser: Parser) -> None:
    add = parser.add_argument
    add("--prompt_file", required=True, help="a few prompts that differ, a line each, as for generate.py")
    add("--out", type=Path, required=True, help="the profile, a YAML file")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep", type=_share, help="the mean share of blocks over layers and steps, such as 0.15")
    budget.add_argument("--seconds", type=_seconds, help="of a video on this card, without loading")
    add("--shares", type=_share, nargs="+", default=SHARES, help="shares to choose from (default: 0.05 to 0.5)")
    add("--stretches", type=positive, default=4, help="parts of the steps that get shares of their own (default: 4)")
    add("--walk_steps", type=positive, default=8, help="of the walks that are measured on, at least (default: 8)")
    add("--check", type=int, help="last prompts that are not measured but checked on (default: 1 of several)")
    add("--mode", choices=("auto", "exact", "fast"), default="auto", help="how; default: exact if that is quick")
    add("--pool", type=_three, metavar="F-R-C", help="parts of a tile that blocks are chosen by, such as 1-4-4")
    add("--window", type=_three, metavar="F-R-C", help="blocks of the window that is kept besides, such as 11-3-3")
    add("--measurements", type=Path, help="where measurements lie (default: beside --out, .measured.jsonl)")
    add("--plot", type=Path, help="a picture of it, .png; needs matplotlib")
    add("--steps", help="the same as --sample_steps")
    add("--seed", type=int, default=0, help="of the first prompt, the next count on, where none is given (default: 0)")


def _share(text: str) -> float:
    share = _number(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is no share of blocks, above 0 and below 1")
    return share


def _seconds(text: str) -> float:
    if (seconds := _number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is no time in seconds")
    return seconds


def _number(text: str) -> float:
    # float() alone would take nan, inf and underscores.
    if not re.fullmatch(r"\d{0,9}\.?\d{1,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a number such as 0.15")
    return float(text)


def _three(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})-(\d{1,9})", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not frames-rows-columns, such as 1-4-4")
    frames, rows, columns = map(int, found.groups())
    return frames, rows, columns


def _check_plot(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"plot {path} needs matplotlib, which is not installed; pip install matplotlib")
    if path.suffix != ".png":
        raise InputError(f"plot {path} must end in .png")
    check_writable(path, "--plot")
