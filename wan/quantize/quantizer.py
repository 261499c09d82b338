"""Linear layers quantised while their weights are read, so that they never lie anywhere unquantised as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nabla import InputError
from wan.quantize.table import QUANTIZATIONS

SAMPLE_ROWS = 256


def check_quantization(key: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `InputError` if weights cannot be quantised so, for a device and in a model of `dtype`."""
    if key is not None:
        QUANTIZATIONS[key].check(device, dtype)


class Quantizer:
    """Quantises the weights of a model's linear layers, those within its blocks, one at a time.

    float32: modules by name whose layers stay in that, whatever the model's type
    layers: names of weights to quantise
    device: that they run on and are quantised on
    home: where quantised weights wait
    errors: what it adds to each layer's outputs, relative, on normally distributed inputs
    left: how many layers it does not take
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        key: str,
        device: torch.device,
        home: torch.device,
        float32: Sequence[str] = (),
    ):
        # Layers outside of the blocks, a small part of the weights, stay as they are.
        inside = {id(module) for module in blocks.modules() if isinstance(module, nn.Linear)}
        names = {name for name, module in model.named_modules() if id(module) in inside}
        # So do those for which half precision is too little already.
        self.layers = {f"{name}.weight" for name in names if not set(name.split(".")) & set(float32)}
        self.quantization = QUANTIZATIONS[key]
        self.device, self.home = device, home
        self.errors: list[float] = []
        self.left = 0

    @torch.no_grad()
    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model, in its final type, quantised if it is a weight of the linear layers."""
        if name not in self.layers or self.quantization.quantize is None:
            return tensor
        weight = tensor.to(self.device)
        if not self.quantization.takes(weight):
            # As it was read and where; the copy on the device was made to be looked at.
            self.left += 1
            return tensor
        quantized = nn.Parameter(self.quantization.quantize(weight), requires_grad=False)
        inputs = sample(weight)
        exact = nn.functional.linear(inputs, weight)
        # Before it goes to where it waits, where it may not run.
        self.errors.append(((nn.functional.linear(inputs, quantized) - exact).norm() / exact.norm()).item())
        move_inner(quantized, self.home)
        return quantized

    def describe(self, asked: bool = False) -> str:
        """One line: how many layers, and their errors.

        asked: it was asked for by name, not chosen by a plan; raises `InputError` then if there was no layer to take
        """
        key, sizes = self.quantization.key, self.quantization.sizes
        if not self.errors and asked:
            raise InputError(f"{key} takes none of these linear layers: {sizes}")
        if not self.errors:
            return f"none of {self.left} linear layers is of a size that {key} takes"
        name = self.quantization.name if asked else key
        left = f" ({self.left} left as they were)" if self.left else ""
        mean = sum(self.errors) / len(self.errors)
        return (
            f"{len(self.errors)} linear layers in {name}{left}, "
            f"outputs off by {mean:.1%} on average, {max(self.errors):.1%} at worst"
        )


def make_quantizer(
    model: nn.Module,
    blocks: nn.ModuleList,
    key: str | None,
    device: torch.device,
    home: torch.device,
    float32: Sequence[str] = (),
) -> Quantizer | None:
    """A `Quantizer`, or None if nothing is to be quantised, or a file has done so."""
    if key is None or QUANTIZATIONS[key].quantize is None:
        return None
    return Quantizer(model, blocks, key, device, home, float32)


def quantize_layers(
    model: nn.Module, blocks: nn.ModuleList, key: str, device: torch.device, float32: Sequence[str] = ()
) -> str:
    """Quantise a model that is on its device already, in place, before it is compiled; see `Quantizer`.

    Returns a line about it. Raises `InputError` if it takes none of the layers.
    """
    quantizer = Quantizer(model, blocks, key, device, device, float32)
    for name, module in model.named_modules():
        if f"{name}.weight" in quantizer.layers:
            module.weight = quantizer(f"{name}.weight", module.weight)
    return quantizer.describe(asked=True)


def sample(weight: Tensor) -> Tensor:
    """Inputs to try a layer of this weight (out, in) with."""
    # Drawn on the CPU, so that every device tries the same numbers.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLE_ROWS, weight.shape[1], generator=generator).to(weight)


def move_inner(tensor: Any, device: torch.device) -> None:
    """Move what a quantised tensor is made of, in place; it goes on naming the device that it runs on."""
    for name in tensor.__tensor_flatten__()[0]:
        # Inner tensors may be of this kind in turn, where scales are quantised too.
        inner = getattr(tensor, name)
        if is_traceable_wrapper_subclass(inner):
            move_inner(inner, device)
        else:
            setattr(tensor, name, inner.to(device))
