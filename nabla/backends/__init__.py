"""The kernels behind one interface, and the choice of one for a device.

A backend is a module with `choose(q, k, selection)` and `prepare(blocks, layout)`, which both give what its
`attend(q, k, v, prepared)` needs, the flag `DIFFERENTIABLE`, and `DTYPES`, None for all. Before it is used on a device
it must agree there with `reference` on small problems that dense attention would fail.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch

from nabla.backends import flex, reference
from nabla.config import InputError, NablaConfig
from nabla.selection import Selection

BACKENDS = {"flex": flex, "reference": reference}

_verified: dict[tuple[str, torch.device, int], str] = {}


def choose(name: str, device: torch.device, block: int) -> str:
    """The key of `BACKENDS` to use for `name` ("auto" or such a key) on a device, with blocks of `block` tokens.

    `auto` takes flex on a GPU, where it must pass its check, and reference elsewhere; on a CPU flex costs a compile of
    many seconds, so it is taken there only if its check was asked for and passed before. Raises `InputError` if the
    named backend fails its check.
    """
    if name == "reference":
        return "reference"
    if name == "auto" and device.type != "cuda" and _verified.get(("flex", device, block)) != "":
        return "reference"
    fault = verify("flex", device, block)
    if not fault:
        return "flex"
    if name == "flex":
        raise InputError(f"backend flex does not work on {device}: {fault}; use backend: reference")
    warnings.warn(f"flex does not work on {device} ({fault}); using the slow backend reference", stacklevel=3)
    return "reference"


def verify(name: str, device: torch.device, block: int) -> str:
    """Check a backend against `reference` on a device, once; "" if it agrees, else what is wrong in one line."""
    key = name, device, block
    if key not in _verified:
        _verified[key] = _fault(BACKENDS[name], device, block)
    return _verified[key]


@torch.no_grad()
def _fault(backend: ModuleType, device: torch.device, block: int) -> str:
    """What is wrong with a backend's answers, on a layout of full tiles and on one with partial tiles."""
    dtype, tolerance = (torch.bfloat16, 2e-2) if device.type == "cuda" else (torch.float32, 1e-4)
    generator = torch.Generator().manual_seed(0)
    random = functools.partial(torch.randn, generator=generator)
    for columns in (3 * block, 3 * block - block // 4):
        selection = Selection.build((3, 1, columns), NablaConfig(keep=0.4, tile=(1, 1, block)), device)
        q, k, v = (random(1, 2, selection.layout.blocks * block, 64).to(device, dtype) for _ in range(3))
        try:
            result = backend.attend(q, k, v, backend.choose(q, k, selection)).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an optional kernel raises is a reason not to use it, and is reported
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        exact = reference.attend(q.float(), k.float(), v.float(), reference.choose(q, k, selection))
        error = (result - exact).norm() / exact.norm()
        if not error < tolerance:
            return f"its result is off by {error:.1%}"
    return ""
