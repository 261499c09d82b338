"""What all benchmarks share: rows of a table, their timing, and the dense kernels to compare with."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nabla import NablaConfig
from wan.config.settings import VideoSettings
from wan.memory.estimates import GIB
from wan.memory.peak import peak_gpu_bytes

Row = dict[str, Any]


def timed(
    what: str,
    function: Callable[[], object],
    args: argparse.Namespace,
    warm: bool = True,
    calls: int = 1,
    **extra: Any,
) -> Row:
    """A row: the median of `args.repeats` runs, after one that warms up, with the least and the greatest.

    calls: of which a run is made, one behind the other; the row is of one of them
    """
    if warm:
        function()
    synchronize(args)
    # By the clock after all work is done, so that the host's time to start kernels counts, as it does in a run.
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(args)
        times.append(1000 * (time.perf_counter() - start) / calls)
    return row_of(what, times) | extra


def row_of(what: str, times: list[float]) -> Row:
    """A row from times in milliseconds."""
    return {"what": what, "ms": statistics.median(times), "low": min(times), "high": max(times)}


def synchronize(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def label(video: VideoSettings) -> str:
    return f"{video.size[0]}x{video.size[1]}x{video.frame_num}"


def sparse_configs(args: argparse.Namespace) -> list[NablaConfig]:
    """Of the shares of blocks, the thresholds and the algorithms asked for, in this order."""
    kept = [NablaConfig(keep=keep, backend=args.backend) for keep in args.keep]
    kept += [NablaConfig(threshold=value, backend=args.backend) for value in args.threshold]
    return kept + [replace(NablaConfig.parse(one), backend=args.backend) for one in args.algorithm]


def dense_kernels(device: torch.device) -> dict[str, Any]:
    """Dense attention's kernels by name, each with the context that selects it."""
    if device.type != "cuda":
        return {"sdpa": nullcontext}
    return {
        "cudnn": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        "flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    }


def reset_peak(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak_memory(args: argparse.Namespace) -> Row:
    """The most GPU memory that tensors took since `reset_peak`."""
    if not args.device.startswith("cuda"):
        return {}
    return {"peak_gib": round(peak_gpu_bytes() / GIB, 1)}
