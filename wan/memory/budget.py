"""Budgets of memory: what a GPU and the host have free, and torch kept within it."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from nabla import InputError
from wan.memory.placement import free_bytes
from wan.memory.planner import GB, MemoryBudget

AUTO = "auto"
# The limit and the use of a container's memory, in the second and the first version of cgroups.
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
# What CUDA and its libraries hold beside the memory that torch gives out.
CONTEXT = int(0.7 * GB)


def parse_memory(text: str) -> str | float:
    """`auto`, or GB to stay under; raises `InputError` for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if text == AUTO or (math.isfinite(number) and number > 0):
        return text if text == AUTO else number
    raise InputError(f"memory {text!r} is neither auto nor GB to stay under; 24 suits a card of 24 GB")


def check_memory(memory: str | float | None, device: torch.device, processes: object, offload: bool | None) -> None:
    """Raise `InputError` for what a plan of memory does not go with."""
    if memory is None:
        return
    if device.type != "cuda":
        raise InputError(f"memory {memory} plans the memory of a GPU, and this runs on {device}; leave it out")
    if processes is not None:
        raise InputError("memory plans for one process, and torchrun starts several; use dit_fsdp and t5_fsdp there")
    if offload is not None:
        raise InputError("memory decides what is offloaded; leave offload_model out, or memory")


def budget_of(device: torch.device, memory: str | float) -> MemoryBudget:
    """Free bytes of a GPU and of the host; a number of GB is for all of the process, CUDA's own memory included."""
    # Free memory is without what CUDA itself holds by now; a number that is asked for includes it.
    free, besides = free_bytes(device), CONTEXT + torch.cuda.memory_allocated(device)
    gpu = free if memory == AUTO else min(free, max(0, int(memory * GB) - besides))
    return MemoryBudget(gpu, *host_bytes(), besides)


def host_bytes() -> tuple[int, int]:
    """(free, total) bytes of host memory, of this container if it has a limit."""
    table = Path("/proc/meminfo")
    if not table.is_file():
        raise InputError(f"memory cannot tell how much host memory is free: there is no {table} here; leave it out")
    lines = (line.split(":") for line in table.read_text().splitlines())
    found = {name: int(value.split()[0]) * 1024 for name, value in lines}
    free, total = found["MemAvailable"], found["MemTotal"]
    folder = Path("/sys/fs/cgroup")
    for most, now in CGROUP_FILES:
        # Of a container, which sees its own group here. Without a limit the newer version says `max`, the older one a
        # number beyond any memory.
        if (folder / most).is_file() and (text := (folder / most).read_text().strip()).isdecimal():
            # Cached files count as used there, but make room.
            total = min(total, int(text))
            free = min(free, max(0, total - int((folder / now).read_text()) + _cached(folder / most)))
    return free, total


def _cached(limit: Path) -> int:
    stat = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))


def limit(device: torch.device, budget: MemoryBudget) -> None:
    """Keep torch from taking more of a GPU than a budget beside what it has, in this process from now on."""
    total = torch.cuda.get_device_properties(device).total_memory
    most = budget.gpu + torch.cuda.memory_allocated(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device.index)
