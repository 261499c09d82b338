"""The attention kernels: which are installed, and agree with the reference on this device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from nabla import NablaConfig
from nabla.backends import BACKENDS, CHECK_HEAD_SIZE, check_dtype, choose, inputs_unsupported_reason, verify


@dataclass(frozen=True)
class KernelStatus:
    """usable: whether it passed its check, None if that was not asked for; chosen: whether `backend: auto` takes it"""

    name: str
    usable: bool | None
    note: str
    chosen: bool


def check_kernels(device: torch.device, check: bool = True) -> tuple[KernelStatus, ...]:
    """Of blocks of 64 tokens and heads of 128, as Wan2.1 has them; a check compiles, for a minute on a slow CPU."""
    block, dtype = NablaConfig().block, check_dtype(device, None)
    with warnings.catch_warnings():
        # What is chosen is settled first: on a CPU a passed check would change it.
        warnings.simplefilter("ignore")
        chosen, _ = choose("auto", device, block, dtype, CHECK_HEAD_SIZE) if check else ("", "")
    found = []
    for name, backend in BACKENDS.items():
        fault = backend.unsupported_reason(device, block) or inputs_unsupported_reason(backend, dtype, CHECK_HEAD_SIZE)
        # Three answers: False with its fault, None where nothing was checked, True once it agrees with the reference.
        usable: bool | None = False
        if not fault and not check:
            usable, fault = None, "installed; not checked"
        elif not fault:
            fault = verify(name, device, block, dtype)
            usable, fault = (True, "passes its check") if not fault else (False, f"fails its check: {fault}")
        found.append(KernelStatus(name, usable, fault, name == chosen))
    return tuple(found)
