"""Which blocks are best kept: rules, shares, dense layers and dense steps, on the checkpoint of the data set `shapes`.

`measure` writes what it finds, as it finds it, into a folder, and goes on there when started again; `report` draws a
picture of it and prints the tables of docs/quality.md.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from nabla import InputError
from wan.files.json_files import write_json
from wan.files.video import check_writable
from wan.observe.console import log_to_stderr, positive
from wan.run.flags import SMALL_CHECKPOINT
from wan.run.versions import installed_versions
from wan.shapes.accuracy import worker_map
from wan.tools.study import settings
from wan.tools.study.bench import Bench
from wan.tools.study.distillation import distilled, losses
from wan.tools.study.likeness import Likeness
from wan.tools.study.output_error import OutputErrors
from wan.tools.study.picture import draw
from wan.tools.study.report import summary, tables
from wan.tools.study.results import DECIDING, Results, read_rows
from wan.tools.study.rules import RULES
from wan.tools.study.settings import DENSE, Setting
from wan.tools.study.times import Times

log = logging.getLogger("wan")

PARTS = ("error", "videos", "sentences", "distill")
# What each part measures, but for `distill`, which measures in all of them.
LISTS = {"error": settings.of_errors, "videos": settings.of_videos, "sentences": settings.of_sentences}
Measure = Callable[[Setting], dict[str, list[float]]]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    log_to_stderr()
    measure(args) if args.command == "measure" else report(args)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_measure(commands.add_parser("measure", help="measure, into a folder", formatter_class=form).add_argument)
    add = commands.add_parser("report", help="tables and a picture", formatter_class=form).add_argument
    add("results", type=Path, nargs="+", help="results.jsonl of `measure`, of one run or of several")
    add("--times", type=Path, nargs="*", default=[], help="what scripts/benchmark.py attention printed")
    add("--picture", type=Path, help="a PNG of error and likeness over shares and milliseconds; needs matplotlib")
    add("--json", type=Path, help="a JSON file of means and intervals")
    return parser.parse_args(argv)


def add_measure(add: Callable[..., Any]) -> None:
    add("--out", type=Path, required=True, help="a folder, for what is found and for what training makes")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--minutes", nargs="*", default=[], metavar="PART=MINUTES", help="after which no further setting is begun")
    add("--ckpt_dir", default=str(SMALL_CHECKPOINT), help="the checkpoint")
    add("--size", default="512*512", help="width*height")
    add("--frame_num", type=positive, default=33, help="frames")
    add("--steps", type=positive, default=20, help="sampling steps")
    add("--shares", type=share, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 0.5], help="of key blocks kept")
    add("--rules", nargs="+", choices=RULES, default=list(RULES), help="rules to compare")
    add(
        "--profile",
        type=Path,
        nargs="*",
        default=[],
        help="calibrated profiles besides, see scripts/calibrate_attention.py",
    )
    add("--prompts", type=positive, default=5, help="error: sentences")
    add("--videos", type=positive, default=10, help="videos: sentences")
    add("--seeds", type=positive, default=3, help="error, videos: noises for each sentence")
    add("--sentences", type=positive, default=200, help="sentences: how many, of one noise each")
    add("--clips", type=positive, default=1000, help="distill: clips to draw and train on")
    add("--distill_steps", type=positive, default=250, help="distill: steps at each share")
    add("--distill_batch", type=positive, default=16, help="distill: clips in a step")
    add("--distill_shares", type=share, nargs="+", default=[0.2, 0.1], help="distill: shares")
    add("--batch", type=positive, default=10, help="videos sampled together")
    add("--seed", type=int, default=5000, help="of the sentences and of the first noise")
    add("--workers", type=int, default=0, help="processes that draw clips and measure videos")
    add("--device", help="cuda or cpu (default: cuda if there is one)")


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and up to 1")
    return value


def measure(args: argparse.Namespace) -> None:
    """Raises `InputError` for what cannot be measured."""
    if args.workers < 0:
        raise InputError(f"workers {args.workers}: give 0 or more")
    limits, profiles = read_minutes(args.minutes), settings.of_profiles(args.profile)
    results, bench = Results(args.out), Bench(args)
    results.note(**conditions(args, bench.device))
    with worker_map(args.workers) as each:
        measures: dict[str, Measure] = {
            "error": OutputErrors(bench).measure,
            "videos": Likeness(bench, args.videos, args.seeds).measure,
            "sentences": Likeness(bench, args.sentences, 1, each).measure,
        }
        for part in args.parts:
            until = time.monotonic() + 60 * limits.get(part, float("inf"))
            if part == "distill":
                distill(args, bench, results, measures, until)
            else:
                wanted = [one for one in LISTS[part](args.shares) if one.rule in (DENSE, *args.rules)]
                walk(part, [*profiles, *wanted], results, measures[part], until)


def walk(part: str, every: Iterable[Setting], results: Results, measure: Measure, until: float = float("inf")) -> None:
    """Measure what is not there yet, in order; when the time is over the rest is left, which the log says."""
    missing = [setting for setting in every if not results.has(part, setting)]
    for number, setting in enumerate(missing):
        if time.monotonic() > until:
            log.warning("%s: the time is over, %d of %d settings are left", part, len(missing) - number, len(missing))
            return
        start = time.monotonic()
        values = measure(setting)
        seconds = time.monotonic() - start
        results.add(part, setting, seconds, **values)
        means = (f"{name} {sum(some) / len(some):.4f}" for name, some in values.items() if "level" not in name)
        print(f"{part}: {setting.words}: {', '.join(means)} ({seconds:.1f} s)", flush=True)


def distill(
    args: argparse.Namespace, bench: Bench, results: Results, measures: dict[str, Measure], until: float
) -> None:
    """Distil at each share, and measure what comes of it."""
    for kept in args.distill_shares:
        if time.monotonic() > until:
            log.warning("distill: the time is over before share %s", kept)
            return
        start, lists = time.monotonic(), settings.of_distilled(kept)
        setting = lists["error"][0]
        bench.distilled[kept] = distilled(args, setting, len(bench.shipped.transformer.blocks), bench.device)
        if not results.has("distill", setting):
            results.add("distill", setting, time.monotonic() - start, **losses(bench.distilled[kept]))
        for part, some in lists.items():
            walk(part, some, results, measures[part])


def read_minutes(texts: list[str]) -> dict[str, float]:
    """`error=2` and its like as numbers by part."""
    found = {}
    for text in texts:
        part, _, minutes = text.partition("=")
        try:
            if part not in PARTS:
                raise ValueError
            found[part] = float(minutes)
        except ValueError:
            raise InputError(f"minutes {text!r} are not PART=MINUTES with a part of {', '.join(PARTS)}") from None
    return found


def conditions(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What decides the numbers, and on what they were measured."""
    found: dict[str, Any] = {name: getattr(args, name) for name in (*DECIDING, "clips")}
    # Wherever it lies.
    found["ckpt_dir"] = Path(args.ckpt_dir).resolve().name
    found |= {"torch": torch.__version__, **installed_versions(("diffusers", "transformers"))}
    return found | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}


def report(args: argparse.Namespace) -> None:
    if args.picture:
        check_writable(args.picture, "--picture")
    rows = [row for path in args.results for row in read_rows(path)]
    times = Times.read(args.times)
    found = summary(rows, times)
    print(tables(rows, times))
    if args.json:
        write_json(args.json, found)
    if args.picture:
        draw(found["rows"], times, args.picture)
