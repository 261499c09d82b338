"""Linear layers packed by torchao while their weights are read, so that they never lie anywhere unpacked as a whole.

int8: in groups of up to 256, unpacked at each use; int4: 4-bit NormalFloat in groups of 64, unpacked at each use; fp8:
see `wan.quantize.float8`. The weights are packed on the device that they run on.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nabla import InputError
from wan.memory.estimates import GGUF
from wan.quantize.float8 import MULTIPLE, check_fp8, float8_config, sample

PACKINGS = ("int8", "fp8", "int4")
# Not packed, or by the file.
AS_READ = None, GGUF
# With a scale a row the compiler takes `_weight_int8pack_mm`, which needs float32 copies and uses no matrix units.
INT8_GROUP = 256
# NormalFloat's scales are packed too: 256 of them, each for 64 weights.
NF4_MULTIPLE = 64 * 256


def check_packing(packing: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `InputError` if weights cannot be packed so, for a device and in a model of `dtype`."""
    if packing == "fp8":
        check_fp8(device, dtype)
    elif packing not in AS_READ and importlib.util.find_spec("torchao") is None:
        raise InputError(f"{packing} weights need torchao, which is not installed; pip install -r requirements-fp8.txt")


class Packer:
    """Packs the weights of a model's linear layers, those within its blocks, one at a time.

    layers: names of weights to pack
    home: where packed weights wait
    errors: what packing adds to each layer's outputs, relative, on normally distributed inputs
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, packing: str, device: torch.device, home: torch.device):
        inside = {id(module) for module in blocks.modules() if isinstance(module, nn.Linear)}
        self.layers = {f"{name}.weight" for name, module in model.named_modules() if id(module) in inside}
        self.pack = _PACK[packing]
        self.packing, self.device, self.home = packing, device, home
        self.errors: list[float] = []
        self.left = 0

    @torch.no_grad()
    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model, in its final type, packed if it is a weight of the linear layers."""
        if name not in self.layers:
            return tensor
        weight = tensor.to(self.device)
        packed = self.pack(weight)
        if packed is None:
            self.left += 1
            return tensor
        packed = nn.Parameter(packed, requires_grad=False)
        inputs = sample(weight)
        exact = nn.functional.linear(inputs, weight)
        self.errors.append(((nn.functional.linear(inputs, packed) - exact).norm() / exact.norm()).item())
        move_inner(packed, self.home)
        return packed

    def describe(self) -> str:
        """One line: how many layers, and their errors."""
        if not self.errors:
            return f"none of {self.left} linear layers is of a size that {self.packing} takes"
        left = f" ({self.left} left as they were)" if self.left else ""
        mean = sum(self.errors) / len(self.errors)
        return (
            f"{len(self.errors)} linear layers in {self.packing}{left}, "
            f"outputs off by {mean:.1%} on average, {max(self.errors):.1%} at worst"
        )


def make_packer(
    model: nn.Module, blocks: nn.ModuleList, packing: str | None, device: torch.device, home: torch.device
) -> Packer | None:
    """A `Packer`, or None if nothing is to be packed."""
    return None if packing in AS_READ else Packer(model, blocks, packing, device, home)


def move_inner(tensor: Tensor, device: torch.device) -> None:
    """Move what a packed tensor is made of, in place; the tensor itself goes on naming the device that it runs on."""
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        if is_traceable_wrapper_subclass(inner):
            move_inner(inner, device)
        else:
            setattr(tensor, name, inner.to(device))


def _int8(weight: Tensor) -> Tensor | None:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup

    group = PerGroup(math.gcd(INT8_GROUP, weight.shape[1]))
    return _by_torchao(weight, Int8WeightOnlyConfig(granularity=group, set_inductor_config=False))


def _fp8(weight: Tensor) -> Tensor | None:
    fits = weight.shape[0] % MULTIPLE == 0 == weight.shape[1] % MULTIPLE
    return _by_torchao(weight, float8_config()) if fits and bool(weight.any(dim=1).all()) else None


def _int4(weight: Tensor) -> Tensor | None:
    from torchao.quantization import to_nf4

    # A group of zeros would have the scale zero, and become NaN.
    if weight.numel() % NF4_MULTIPLE or not bool(weight.view(-1, 64).any(dim=1).all()):
        return None
    return to_nf4(weight)


def _by_torchao(weight: Tensor, config: object) -> Tensor:
    from torchao.quantization import quantize_

    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, config)
    return layer.weight


_PACK: dict[str, Callable[[Tensor], Tensor | None]] = {"int8": _int8, "fp8": _fp8, "int4": _int4}
