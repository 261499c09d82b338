"""Triton, where it is installed, and whether our kernels can run on a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def can_run(x: Tensor) -> bool:
    """Whether Triton kernels written for NVIDIA GPUs can take a tensor."""
    # Not for AMD's: the kernel that chooses blocks asks for `maxnreg`, which is of PTX.
    return triton is not None and x.is_cuda and torch.version.hip is None
