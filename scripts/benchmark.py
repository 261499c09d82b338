"""Time the attention's parts, the attention and the transformer against dense baselines of the same run.

Prints a table for people, then one line of JSON for programs. Shares of kept blocks are set exactly, so runs compare.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import nabla
from nabla import InputError, NablaConfig
from nabla.backends import BACKENDS
from wan.attention import apply_attention, compile_blocks
from wan.config import VideoSettings
from wan.random_checkpoint import MODELS, random_transformer

TEXT_ROWS = 512
Row = dict[str, Any]


def main() -> int:
    args = parse_args()
    try:
        video = VideoSettings(size=args.size, frame_num=args.frame_num)
        rows = list(MODES[args.mode](args, video, torch.device(args.device)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    width = max(len(row["what"]) for row in rows)
    for row in rows:
        extra = "".join(f"  {key} {value}" for key, value in row.items() if key not in ("what", "ms", "low", "high"))
        print(f"{row['what']:<{width}}  {row['ms']:>10.3f} ms  ({row['low']:.3f} to {row['high']:.3f}){extra}")
    print(json.dumps({"mode": args.mode, "settings": vars(args), "machine": machine(args.device), "rows": rows}))
    return 0


def parse_args() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("mode", choices=MODES)
    add("--model", choices=MODELS, default="t2v-14B" if on_gpu else "nano", help="whose heads and layers to use")
    add("--size", default="1280*720" if on_gpu else "256*208")
    add("--frame_num", type=int, default=81 if on_gpu else 9)
    add("--keep", type=float, nargs="+", default=[0.1, 0.2], help="shares of blocks kept")
    add("--backend", default="auto")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if on_gpu else "float32")
    add("--repeats", type=int, default=7, help="timed runs, of which the median is shown")
    add("--quick", action="store_true", help="two repeats and the first share only")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.keep = 2, args.keep[:1]
    return args


def machine(device: str) -> dict[str, str]:
    """Hardware and versions that a number belongs to."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "cpu": platform.machine()}
    if device.startswith("cuda"):
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def timed(what: str, function: Callable[[], object], args: argparse.Namespace, **extra: Any) -> Row:
    """A row: the median of `args.repeats` runs after one that warms up, with the least and the greatest."""
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    function()
    synchronize()
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        function()
        synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return {"what": what, "ms": statistics.median(times), "low": min(times), "high": max(times), **extra}


def random_qkv(args: argparse.Namespace, grid: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    sizes = MODELS[args.model]
    shape = 1, math.prod(grid), sizes.heads, sizes.dim // sizes.heads
    torch.manual_seed(0)
    return tuple(torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype)) for _ in range(3))


def dense_kernels(device: torch.device) -> dict[str, Any]:
    """Dense attention's kernels by name, each with the context that selects it."""
    if device.type != "cuda":
        return {"sdpa": nullcontext}
    return {
        "cudnn": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        "flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    }


@torch.no_grad()
def mask_mode(args: argparse.Namespace, video: VideoSettings, device: torch.device) -> Iterator[Row]:
    """The build of a layer's block lists from q and k in tile order, beside the gather into that order."""
    grid = video.token_grid
    q, k, v = random_qkv(args, grid)
    for config in [*(NablaConfig(keep=share, backend=args.backend) for share in args.keep), NablaConfig(threshold=0.7)]:
        plan = nabla.plan(grid, config, device)
        to_tiles = plan.selection.layout.to_tiles
        q_tiles, k_tiles = to_tiles(q), to_tiles(k)
        backend = BACKENDS[plan.backend]
        yield timed(f"masks, {config.algorithm}", lambda: backend.choose(q_tiles, k_tiles, plan.selection), args)
    yield timed("gather of q, k and v into tiles", lambda: [to_tiles(x) for x in (q, k, v)], args)
    yield timed("the same masks by sorting", lambda: plan.selection.blocks(q_tiles, k_tiles), args)


@torch.no_grad()
def attention_mode(args: argparse.Namespace, video: VideoSettings, device: torch.device) -> Iterator[Row]:
    """One layer's attention over chosen blocks, masks apart, and whole; TFLOP/s count kept pairs of tokens only."""
    grid = video.token_grid
    q, k, v = random_qkv(args, grid)
    flops = 4 * q.shape[1] ** 2 * q.shape[2] * q.shape[3]
    for name, kernel in dense_kernels(device).items():
        with kernel():
            row = timed(f"dense, {name}", lambda: nabla.attention(q, k, v, grid, NablaConfig()), args)
        yield row | {"tflops": round(flops / row["ms"] / 1e9, 1)}
    for share in args.keep:
        plan = nabla.plan(grid, NablaConfig(keep=share, backend=args.backend), device)
        layout, backend = plan.selection.layout, BACKENDS[plan.backend]
        tiles = [layout.to_tiles(x) for x in (q, k, v)]
        chosen = backend.choose(*tiles[:2], plan.selection)
        pairs = nabla.select_blocks(q, k, grid, plan.config).double() @ layout.sizes.double() @ layout.sizes.double()
        kept_flops = 4 * pairs.sum().item() * q.shape[3]
        row = timed(f"kernel {plan.backend}, keep {share}", lambda: backend.attend(*tiles, chosen), args)
        yield row | {"tflops": round(kept_flops / row["ms"] / 1e9, 1)}
        yield timed(f"attend, keep {share}", lambda: nabla.attend(q, k, v, plan), args)


@torch.no_grad()
def forward_mode(args: argparse.Namespace, video: VideoSettings, device: torch.device) -> Iterator[Row]:
    """The whole transformer with random weights and compiled blocks: dense as diffusers does it, then sparse."""
    dtype = getattr(torch, args.dtype)
    transformer = random_transformer(args.model, dtype, device)
    compile_blocks(transformer)
    latents = torch.randn(1, transformer.config.in_channels, *video.latents_size, device=device, dtype=dtype)
    text = torch.randn(1, TEXT_ROWS, transformer.config.text_dim, device=device, dtype=dtype)
    timestep = torch.tensor([500], device=device)

    def forward() -> torch.Tensor:
        return transformer(latents, timestep, text, return_dict=False)[0]

    def row(what: str, **extra: Any) -> Row:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = timed(what, forward, args, **extra)
        if device.type == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        return found

    name, kernel = next(iter(dense_kernels(device).items()))
    with kernel():
        dense = row(f"dense, {name}")
    yield dense
    for share in args.keep:
        apply_attention(transformer, NablaConfig(keep=share, backend=args.backend))
        found = row(f"nabla, keep {share}")
        yield found | {"speedup": round(dense["ms"] / found["ms"], 2)}


MODES = {"mask": mask_mode, "attention": attention_mode, "forward": forward_mode}

if __name__ == "__main__":
    sys.exit(main())
