"""Weights that a GGUF file has quantised, block by block in many ways; they stay so, and are unpacked at each use."""

from __future__ import annotations

import torch
from torch import Tensor

from wan.quantize.quantization import Quantization


def check(device: torch.device, dtype: torch.dtype) -> None:
    """It runs everywhere; the library that reads the file is asked for when that is opened."""


def takes(weight: Tensor) -> bool:
    return False


GGUF = Quantization(
    key="gguf",
    name="GGUF",
    bytes_per_weight=None,
    quantize=None,
    takes=takes,
    check=check,
    using_bytes=12,
)
