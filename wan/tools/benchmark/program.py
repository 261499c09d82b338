"""Time masks, attention, the transformer, its training and whole videos against dense baselines of the same run.

Prints a table for people, then one line of JSON for programs. Shares of kept blocks are set exactly, so runs compare.
Weights are random: times and memory are those of real ones. Mode `parallel` runs under torchrun. Mode `cache` takes a
checkpoint as well, and then compares videos.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform

import torch

from wan.attention.compile import many_compiles
from wan.config.cache_settings import THRESHOLDS
from wan.config.settings import VideoSettings
from wan.observe.console import positive
from wan.quantize.quantizer import check_quantization
from wan.run.versions import installed_versions
from wan.tools.benchmark.attention import attention_mode, mask_mode
from wan.tools.benchmark.cache import cache_mode
from wan.tools.benchmark.calibration import calibration_mode
from wan.tools.benchmark.memory import memory_mode
from wan.tools.benchmark.models import MODELS, family_of
from wan.tools.benchmark.parallel import ROWS, parallel_mode
from wan.tools.benchmark.run import run_mode
from wan.tools.benchmark.serving import serve_mode
from wan.tools.benchmark.timing import Row
from wan.tools.benchmark.training import training_mode
from wan.tools.benchmark.transformer import forward_mode, pipeline_mode

MODES = {
    "mask": mask_mode,
    "attention": attention_mode,
    "forward": forward_mode,
    "pipeline": pipeline_mode,
    "training": training_mode,
    "parallel": parallel_mode,
    "cache": cache_mode,
    "memory": memory_mode,
    "run": run_mode,
    "serve": serve_mode,
    "calibration": calibration_mode,
}
# On a CPU, and on a GPU, of models whose family says nothing else.
SIZE, FRAMES = ("256*208", "1280*720"), (9, 81)
STEPS = 3
# Threshold 0 reuses nothing, and shows what a cache costs and changes by itself.
CACHES = ["first_block:0", *(f"{kind}:{threshold}" for kind in THRESHOLDS for threshold in (0.02, 0.05, 0.1, 0.2))]
CACHES += ["taylorseer:2", "taylorseer:3"]
PACKAGES = ("diffusers", "nvidia-cudnn-frontend", "torchao", "flash-attn-4")


def main(argv: list[str] | None = None) -> int:
    """Run a mode and print its rows. Raises `InputError` for settings that are not allowed or cannot run here."""
    args = parse_args(argv)
    is_first = os.environ.get("RANK", "0") == "0"
    family, sizes = family_of(args.model, args.mode), itertools.product(args.size or [], args.frame_num or [])
    videos = [VideoSettings(size, frames, geometry=family.geometry) for size, frames in sizes]
    if args.fp8:
        check_quantization("fp8", torch.device(args.device), getattr(torch, args.dtype))
    rows = []
    with many_compiles():
        # Under torchrun all processes walk through the rows, in which they exchange tensors; the first prints them.
        for row in MODES[args.mode](args, videos, torch.device(args.device)):
            if is_first:
                print(format_row(row), flush=True)
            rows.append(row)
    if is_first:
        print(
            json.dumps({"mode": args.mode, "settings": vars(args), "machine": machine_facts(args.device), "rows": rows})
        )
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("mode", choices=MODES)
    add("--model", choices=MODELS, default="t2v-14B" if on_gpu else "nano", help="whose heads and layers to use")
    add("--layers", type=positive, help="of the model, all by default")
    add("--size", nargs="+", help=f"{SIZE[on_gpu]} by default, and what Kandinsky-5 was published for")
    add("--frame_num", type=int, nargs="+", help=f"{FRAMES[on_gpu]} by default, Lite 241, Pro 121")
    add("--keep", type=float, nargs="*", default=[0.1, 0.2], help="shares of blocks kept")
    add("--threshold", type=float, nargs="*", default=[], help="thresholds besides")
    add("--algorithm", nargs="*", default=[], help="algorithms besides, such as keep-0.1_pool-1-4-4")
    add("--batch", type=positive, nargs="*", default=[], help="forward: videos at once, besides one")
    add("--mask_refresh", type=int, nargs="*", default=[], help="pipeline: steps to keep masks for, besides none")
    add(
        "--steps",
        type=positive,
        help=f"pipeline, cache, run, serve: sampling steps ({STEPS}); of the first two, the first warms up",
    )
    add("--ckpt_dir", help="cache: a checkpoint whose videos to compare, of its own size and steps by default")
    of_caches = "with it: kind:threshold[:ratios] or taylorseer:interval; mag measures its ratios itself"
    add("--cache", nargs="*", default=CACHES, help=of_caches)
    add("--prompt", nargs="*", help="with it: what videos show, by default sentences of `shapes`")
    add("--count", type=positive, default=4, help="with it: how many sentences")
    add("--sparse_algo", help="with it: attention, the checkpoint's own by default")
    add("--compile", action=argparse.BooleanOptionalAction, help="with it: compile; None does so on a GPU")
    add("--budget", type=float, nargs="*", default=[48, 24, 16, 12], help="memory, run: GB of the GPU to stay under")
    add("--no_dense", action="store_true", help="leave out the dense baselines")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="parallel: what to compare")
    add("--gradient_checkpointing", action="store_true", help="training: keep inputs of blocks alone")
    add("--fp8", action="store_true", help="forward, pipeline: again with float8 linear layers, beside dense ones")
    add("--backend", default="auto")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if on_gpu else "float32")
    add("--repeats", type=positive, default=7, help="timed runs, of which the median is shown")
    add("--quick", action="store_true", help="two repeats and the first share only")
    args = parser.parse_args(argv)
    if args.ckpt_dir is None:
        size, frames = MODELS[args.model].videos.get(args.model, (SIZE[on_gpu], FRAMES[on_gpu]))
        args.size, args.frame_num = args.size or [size], args.frame_num or [frames]
        args.steps = args.steps or STEPS
    elif args.mode != "cache":
        parser.error(f"--ckpt_dir is for mode cache; {args.mode} takes random weights")
    if args.quick:
        args.repeats, args.keep = 2, args.keep[:1]
    return args


def format_row(row: Row) -> str:
    extra = "".join(f"  {key} {value}" for key, value in row.items() if key not in ("what", "ms", "low", "high"))
    return f"{row['what']:<60}  {row['ms']:>10.3f} ms  ({row['low']:.3f} to {row['high']:.3f}){extra}"


def machine_facts(device: str) -> dict[str, str]:
    """Hardware and versions that a number belongs to."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "cpu": platform.machine()}
    found |= installed_versions(PACKAGES)
    if device.startswith("cuda"):
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found
