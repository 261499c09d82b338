"""What there is to say of a way to store the weights of linear layers in fewer bits, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantization:
    """A way to quantise weights, one of `wan.quantize.table`.

    key, name: what settings, plans and records call it; what people do
    bytes_per_weight: that a number takes, its share of scales included; None if the file decides, weight by weight
    quantize: from a weight (out, in) on the device that it runs on to the tensor in its place; None if a file has done
        so already
    takes: whether a weight (out, in) can be quantised so; others are left as they are
    check: raises `InputError` if it cannot run on a device in a model of a dtype
    making_bytes, using_bytes: for each number of the largest layer, what quantising takes of memory beside the weights,
        and what each use does, in code that is not compiled
    cost: how many times slower a run may be before the transformer is rather quantised so; None: only if asked for
    text_cost: the same of the text encoder
    speed: of products, as a multiple of those of the weights as they were
    sizes: which layers it takes, said where it takes none of those that it was asked for
    """

    key: str
    name: str
    bytes_per_weight: float | None
    quantize: Callable[[Tensor], Tensor] | None
    takes: Callable[[Tensor], bool]
    check: Callable[[torch.device, torch.dtype], None]
    making_bytes: int = 0
    using_bytes: int = 0
    cost: float | None = None
    text_cost: float | None = None
    speed: float = 1.0
    sizes: str = ""
