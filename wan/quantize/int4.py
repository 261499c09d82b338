"""Weights in 4 bits: NormalFloat (QLoRA, Dettmers et al. 2023, section 3) in groups of 64, unpacked at each use."""

from __future__ import annotations

import torch
from torch import Tensor

from wan.quantize.by_torchao import require_torchao
from wan.quantize.quantization import Quantization

KEY = "int4"
GROUP = 64
# The scales are quantised too, 256 of them together.
MULTIPLE = GROUP * 256


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise `InputError` if torchao is missing; it runs everywhere."""
    require_torchao(KEY)


def takes(weight: Tensor) -> bool:
    """Whether a weight is of a fit size and has no group of zeros, the scale of which would be zero and it NaN."""
    return weight.numel() % MULTIPLE == 0 and bool(weight.view(-1, GROUP).any(dim=1).all())


def quantize(weight: Tensor) -> Tensor:
    """torchao's tensor for a weight (out, in)."""
    from torchao.quantization import to_nf4

    return to_nf4(weight)


INT4 = Quantization(
    key=KEY,
    name="int4",
    # Half a byte, and of 64 numbers one byte of scale, which have scales in turn.
    bytes_per_weight=0.53,
    quantize=quantize,
    takes=takes,
    check=check,
    making_bytes=24,
    using_bytes=16,
    cost=2.0,
)
