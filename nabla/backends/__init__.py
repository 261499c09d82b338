"""Attention kernels behind one interface, `nabla.backends.interface.Backend`, and the choice of one for a device.

Before a backend is used on a device it must agree there with `reference` on small problems that dense attention would
fail, and so must its gradients before it is used for training.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from nabla.backends import cudnn, flex, gather, reference
from nabla.backends.interface import Backend, Prepared
from nabla.checks import InputError
from nabla.config import NablaConfig
from nabla.dropped import TileMeans
from nabla.selection import Selection, block_means

# The fastest first, as measured on Hopper; on a CPU its compile puts flex aside.
BACKENDS: dict[str, Backend] = {"cudnn": cudnn, "flex": flex, "gather": gather, "reference": reference}
# Where the head size is not known.
CHECK_HEAD_SIZE = 128
# Of a result, relative to its norm: above the rounding of its dtype, and far below what wrong blocks cause.
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class Check(NamedTuple):
    """Of a backend, done once: on a device, for blocks of so many tokens, with its gradients or without.

    dropped: what stands for dropped blocks, as in `NablaConfig`
    """

    name: str
    device: torch.device
    block: int
    dtype: torch.dtype
    head_size: int
    trains: bool
    dropped: str

    @classmethod
    def of(
        cls,
        name: str,
        device: torch.device,
        block: int,
        dtype: torch.dtype | None,
        head_size: int | None,
        trains: bool,
        dropped: str,
    ) -> Check:
        """The check that speaks for a dtype and a head size (None: not known)."""
        # Only the reference has gradients with means, and it is not checked against itself.
        dropped = "none" if trains else dropped
        return cls(name, device, block, check_dtype(device, dtype), head_size or CHECK_HEAD_SIZE, trains, dropped)


# What is wrong, "" where nothing is.
_verified: dict[Check, str] = {}


def choose(
    name: str,
    device: torch.device,
    block: int,
    dtype: torch.dtype | None = None,
    head_size: int | None = None,
    trains: bool = False,
    dropped: str = "none",
) -> tuple[str, str]:
    """The key of `BACKENDS` to use for `name` ("auto" or such a key), and why, in a few words.

    `auto` takes the first that is installed, takes blocks of `block` tokens, the dtype and the head size (None: not
    known), and passes its check on the device, that of its gradients too where `trains`, or with means in place of
    dropped blocks where `dropped` says so. On a CPU flex costs a compile
    of many seconds, so it is taken there only if its check was asked for and passed before. Raises `InputError` if the
    named backend is none of that.
    """
    if name != "auto":
        if reason := inputs_unsupported_reason(BACKENDS[name], dtype, head_size):
            raise InputError(f"backend {name} {reason}; use backend: auto or reference")
        if reason := verify(name, device, block, dtype, head_size, trains, dropped):
            raise InputError(f"backend {name} does not work on {device}: {reason}; use backend: auto or reference")
        return name, "as asked for"
    refused: list[str] = []
    for candidate, backend in BACKENDS.items():
        reason = _unsupported_reason(backend, device, block, dtype, head_size, trains, dropped)
        reason = reason or inputs_unsupported_reason(backend, dtype, head_size)
        if not reason and candidate == "flex" and device.type != "cuda":
            check = Check.of(candidate, device, block, dtype, head_size, trains, dropped)
            reason = _verified.get(check, "compiles for long on a CPU")
        elif not reason and (reason := verify(candidate, device, block, dtype, head_size, trains, dropped)):
            warnings.warn(f"{candidate} does not work on {device} ({reason}); using a slower backend", stacklevel=3)
        if not reason:
            return candidate, "; ".join(["the fastest that passed its check", *refused])
        refused.append(f"{candidate}: {reason}")
    raise AssertionError("the reference works everywhere")


def inputs_unsupported_reason(backend: Backend, dtype: torch.dtype | None, head_size: int | None) -> str:
    """Why a backend does not take tensors of a dtype or heads of a size (None: not known), or ""."""
    if dtype is not None and backend.DTYPES is not None and dtype not in backend.DTYPES:
        return f"does not take {dtype}"
    if head_size is not None and backend.HEAD_SIZES is not None and head_size not in backend.HEAD_SIZES:
        return f"does not take heads of {head_size}"
    return ""


def verify(
    name: str,
    device: torch.device,
    block: int,
    dtype: torch.dtype | None = None,
    head_size: int | None = None,
    trains: bool = False,
    dropped: str = "none",
) -> str:
    """Check a backend against `reference` on a device, once; "" if it agrees, else what is wrong in one line.

    head_size: of q, k and v; None for `CHECK_HEAD_SIZE`
    trains: whether to check its gradients too
    dropped: what stands for dropped blocks, as in `NablaConfig`
    """
    backend = BACKENDS[name]
    if reason := _unsupported_reason(backend, device, block, dtype, head_size, trains, dropped):
        return reason
    check = Check.of(name, device, block, dtype, head_size, trains, dropped)
    if check not in _verified:
        _verified[check] = "" if backend is reference else _check_against_reference(backend, check)
    return _verified[check]


def _unsupported_reason(
    backend: Backend,
    device: torch.device,
    block: int,
    dtype: torch.dtype | None,
    head_size: int | None,
    trains: bool,
    dropped: str,
) -> str:
    reason = backend.unsupported_reason(device, block, dtype, head_size)
    if not reason and trains:
        reason = backend.backward_unsupported_reason(device, dtype, head_size)
    elif not reason and dropped != "none":
        reason = backend.dropped_unsupported_reason(device)
    return reason


def check_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a backend is checked that is to run in `dtype`: on a GPU a half-precision one."""
    if device.type != "cuda":
        return torch.float32
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def _check_against_reference(backend: Backend, check: Check) -> str:
    """What is wrong with a backend's answers, on a layout of full tiles and on one with partial tiles, or ""."""
    _, device, block, dtype, head_size, trains, dropped = check
    # Drawn on the CPU, so that every device is asked the same, and the caller's random numbers stay what they are.
    generator = torch.Generator().manual_seed(0)
    for columns in (3 * block, 3 * block - block // 4):
        # Every row keeps 4 of 9 blocks, so that dense attention is off by far.
        selection = Selection.build((3, 1, columns), NablaConfig(keep=0.4, tile=(1, 1, block)), device)
        shape = 1, 2, selection.layout.blocks * block, head_size
        tensors = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
        q_means, k_means, v_means = (block_means(x, selection.layout) for x in tensors[:3])
        means = None if dropped == "none" else TileMeans(k_means, v_means, selection.layout.sizes)
        # A first use may be under the caller's autocast, which would round what is compared.
        with torch.autocast(device.type, enabled=False):
            try:
                results = _results(backend, tensors, backend.choose(q_means, k_means, selection), means, trains)
            # Says nothing of the kernel, and is not to be remembered as a verdict on it.
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever an optional kernel raises is a reason not to use it, and is reported
                lines = str(error).strip().splitlines() or ["no message"]
                return f"{type(error).__name__}: {lines[0][:200]}"
            wide = [x.float() for x in tensors]
            exact = _results(reference, wide, reference.choose(q_means, k_means, selection), means, trains)
        for what, result in results.items():
            off = (result - exact[what]).norm() / exact[what].norm()
            # Written so that NaN fails, too.
            if not off < CHECK_TOLERANCE[dtype]:
                return f"its {what} is off by {off:.1%}"
    return ""


def _results(
    backend: Backend, tensors: list[Tensor], blocks: Prepared, means: TileMeans | None, trains: bool
) -> dict[str, Tensor]:
    """What a backend computes of q, k, v and the gradient of the result, by what it is, in float32."""
    with torch.set_grad_enabled(trains):
        *qkv, gradient = (x.detach().requires_grad_(trains) for x in tensors)
        q, k, v = qkv
        result = backend.attend(q, k, v, blocks, means)
        gradients = torch.autograd.grad(result, qkv, gradient.detach()) if trains else ()
    names = "result", "gradient of q", "gradient of k", "gradient of v"
    return {name: x.detach().float() for name, x in zip(names, (result, *gradients))}
