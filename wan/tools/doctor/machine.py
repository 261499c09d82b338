"""The machine: its cards, driver, memory and torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from nabla import InputError
from wan.memory.budget import host_bytes
from wan.memory.estimates import GIB

DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Card:
    name: str
    gib: float
    free_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """unseen: what to do about a card that torch does not see, or ""; cuda: of torch's build"""

    device: str
    cards: tuple[Card, ...]
    driver: str | None
    unseen: str
    cores: int
    host_gib: float
    free_host_gib: float
    python: str
    torch: str
    cuda: str | None

    @property
    def card(self) -> Card | None:
        """The one that runs, or None for a CPU."""
        kind, _, number = self.device.partition(":")
        return self.cards[int(number or 0)] if kind == "cuda" else None


def inspect_machine(device: torch.device) -> Machine:
    """Looks at this machine, which will run on a device."""
    cards = tuple(_card(number) for number in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    driver = _driver()
    free, host = _host_bytes()
    return Machine(
        device=str(device),
        cards=cards,
        driver=driver,
        unseen=_unseen(driver) if not cards else "",
        # Those that this process may use, which may be fewer than the machine has.
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        host_gib=host / GIB,
        free_host_gib=free / GIB,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
    )


def _card(number: int) -> Card:
    free, total = torch.cuda.mem_get_info(number)
    return Card(torch.cuda.get_device_name(number), total / GIB, free / GIB, torch.cuda.get_device_capability(number))


def _driver() -> str | None:
    """The version of NVIDIA's driver, or None if there is none."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            # With a time limit, since nvidia-smi may hang where a card is at fault.
            said = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            said = None
        if said is not None and said.returncode == 0 and said.stdout.strip():
            return said.stdout.split()[0]
    # Containers may have the driver without its programs.
    if DRIVER_FILE.is_file() and (match := re.search(r"\d+\.\d+(\.\d+)?", DRIVER_FILE.read_text())):
        return match.group()
    return None


def _unseen(driver: str | None) -> str:
    """What to do where torch sees no card although there is a driver for one."""
    if driver is None:
        return ""
    if torch.version.cuda is None:
        return f"driver {driver} is there, but torch {torch.__version__} is built without CUDA; install one with it"
    return (
        f"driver {driver} is there, but torch for CUDA {torch.version.cuda} sees no card; a newer driver may be needed"
    )


def _host_bytes() -> tuple[int, int]:
    """Free and total host memory; where the system does not say what is free, all of it."""
    try:
        return host_bytes()
    except InputError:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
