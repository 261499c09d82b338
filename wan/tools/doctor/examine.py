"""All that the doctor looks at, where the needed packages are there."""

from __future__ import annotations

from typing import Any

import torch

from nabla import InputError
from wan.files.video import check_encoder
from wan.memory.budget import AUTO, budget_of
from wan.observe.console import say
from wan.parallel.distributed import pick_device
from wan.tools.doctor.advice import advise
from wan.tools.doctor.checkpoints import find_checkpoints
from wan.tools.doctor.fits import MemoryFit, memory_fits
from wan.tools.doctor.kernels import check_kernels
from wan.tools.doctor.machine import Machine, inspect_machine
from wan.tools.doctor.packages import PackageStatus


def examine(
    packages: tuple[PackageStatus, ...], device_name: str | None, check: bool, folder: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The facts by name, and a line for each thing that is needed and broken.

    folder: of a checkpoint that is to be looked at beside those that are known
    Raises `InputError` for a device that cannot be used.
    """
    device = pick_device(device_name)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {device_name!r} is neither a CPU nor a CUDA GPU; use cuda or cpu")
    here = inspect_machine(device)
    if check:
        say(f"checking the kernels on {device}, which may compile for a minute")
    facts: dict[str, Any] = {
        "machine": here,
        "kernels": check_kernels(device, check),
        "packages": packages,
        "fits": _fits(device, here, packages),
        "checkpoints": find_checkpoints(folder),
    }
    facts["advice"] = advise(here, facts["kernels"], packages, facts["fits"], facts["checkpoints"])
    try:
        check_encoder()
    except InputError as error:
        return facts, [str(error)]
    return facts, []


def _fits(device: torch.device, here: Machine, packages: tuple[PackageStatus, ...]) -> tuple[MemoryFit, ...]:
    """Of a GPU alone: on a CPU none of the models is of use."""
    if here.card is None:
        return ()
    can_quantize = not any(one.problem for one in packages if one.name == "torchao")
    return memory_fits(budget_of(device, AUTO), here.card.gib, can_quantize)
