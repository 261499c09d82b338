"""The most memory that this process has held."""

from __future__ import annotations

import resource
import sys

import torch


def peak_host_bytes() -> int:
    """Of the host."""
    # macOS counts in bytes, Linux in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_gpu_bytes(device: torch.device | None = None) -> int:
    """Of a CUDA device, by default the current one: of tensors, since the count was last reset."""
    return torch.cuda.max_memory_allocated(device)


def peak_bytes(device: torch.device) -> int:
    """Of what a model on a device fills: a GPU's own memory, or the host's."""
    return peak_gpu_bytes(device) if device.type == "cuda" else peak_host_bytes()
