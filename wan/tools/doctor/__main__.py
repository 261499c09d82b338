"""What this machine can do, and what it would take to do it faster: python -m wan.doctor

Exit code 1 if something that is needed is broken, which the last lines name; 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from wan.observe.console import exit_with, printable, run_program
from wan.run.flags import Parser, add_shared
from wan.tools.doctor.packages import PackageStatus, check_packages, needed_faults


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m wan.doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_shared(parser, "--device")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out the checks of the kernels, which compile, and that of gradio, whose import takes long",
    )
    parser.add_argument("--ckpt_dir", help="a folder with a checkpoint, to say what it is and what it lacks")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(argv)
    return run_program(report, args)


def report(args: argparse.Namespace) -> int:
    """Print what is found; 1 if something that is needed is broken."""
    found = check_packages(args.quick)
    broken = needed_faults(found)
    facts: dict[str, Any] = {"packages": found}
    if not broken:
        # Imported here, since they need the packages.
        from wan.tools.doctor.examine import examine

        facts, broken = examine(found, args.device, not args.quick, args.ckpt_dir)
    if args.json:
        plain = {name: _plain(part) for name, part in facts.items()}
        print(json.dumps(plain | {"broken": broken, "ok": not broken}, indent=2))
    else:
        print("\n".join(map(printable, _text(facts, found, broken))))
    return 1 if broken else 0


def _plain(part: Any) -> Any:
    """As JSON has it; what says by itself how a file has it, as a plan of memory does, goes by that."""
    if isinstance(part, tuple):
        return [_plain(one) for one in part]
    own = asdict(part)
    return own | {name: one.to_sidecar() for name in own if hasattr(one := getattr(part, name), "to_sidecar")}


def _text(facts: dict[str, Any], found: tuple[PackageStatus, ...], broken: list[str]) -> list[str]:
    from wan.tools.doctor import text

    lines = text.fact_lines(facts) if len(facts) > 1 else []
    return [*lines, *text.package_lines(found), *text.closing_lines(facts.get("advice"), broken)]


if __name__ == "__main__":
    exit_with(main())
