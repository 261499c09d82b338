"""Weights in int8, in groups of up to 256 of a row with a scale each, unpacked at each use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wan.quantize.by_torchao import quantize_weight, require_torchao
from wan.quantize.quantization import Quantization

KEY = "int8"
# With a scale a row the compiler takes `_weight_int8pack_mm`, which needs float32 copies and uses no matrix units.
GROUP = 256


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise `InputError` if torchao is missing; it runs everywhere."""
    require_torchao(KEY)


def takes(weight: Tensor) -> bool:
    return True


def quantize(weight: Tensor) -> Tensor:
    """torchao's tensor for a weight (out, in)."""
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup

    # Groups have to divide a row.
    group = PerGroup(math.gcd(GROUP, weight.shape[1]))
    # Else torchao sets options of torch.compile for the whole process.
    return quantize_weight(weight, Int8WeightOnlyConfig(granularity=group, set_inductor_config=False))


INT8 = Quantization(
    key=KEY,
    name="int8",
    # A byte, and its share of the scale of up to 256.
    bytes_per_weight=1.02,
    quantize=quantize,
    takes=takes,
    check=check,
    making_bytes=12,
    using_bytes=8,
    cost=1.2,
    text_cost=1.1,
)
