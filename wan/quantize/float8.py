"""The transformer's linear layers in float8, by torchao (an optional requirement)."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from nabla import InputError

# The first GPUs with float8 matrix units (Ada), and the sizes that their products are multiples of.
ADA = 8, 9
MULTIPLE = 16
SAMPLE_ROWS = 256
SMALLEST_ROW = 1e-30
OFF = "leave fp8 out, or --fp8 false where a config asks for it"


class Fp8Report(NamedTuple):
    """What `apply_fp8` did: how many layers it changed and left, and the error that float8 adds to their outputs.

    The errors are relative, of each layer alone, on normally distributed inputs.
    """

    layers: int
    left: int
    mean_error: float
    worst_error: float

    def describe(self) -> str:
        errors = f"outputs off by {self.mean_error:.1%} on average, {self.worst_error:.1%} at worst"
        left = f" ({self.left} left as they were)" if self.left else ""
        return f"{self.layers} linear layers in float8{left}, {errors}"


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise `InputError` if float8 layers cannot run on a device, in a transformer of `dtype`."""
    needs = f"fp8 does not work on {device}: it needs an NVIDIA GPU of compute capability 8.9 or more"
    if device.type != "cuda":
        raise InputError(f"{needs}; {OFF}")
    if dtype != torch.bfloat16:
        raise InputError(f"fp8 works in bfloat16 only, not in {str(dtype).removeprefix('torch.')}; choose one of them")
    if torch.version.hip or torch.cuda.get_device_capability(device) < ADA:
        raise InputError(f"{needs}; {OFF}")
    if importlib.util.find_spec("torchao") is None:
        raise InputError(f"fp8 needs torchao, which is not installed; pip install torchao, or {OFF}")


@torch.no_grad()
def apply_fp8(transformer: WanTransformer3DModel) -> Fp8Report:
    """Replace the weights of all linear layers in the transformer's blocks by float8, in place, before compiling.

    A scale a row for weights, stored, and for inputs, found at run time; products are summed in float32 and come out
    in the layer's dtype. The layers must be on the GPU that they run on. Raises `InputError` if none of them fits.
    """
    from torchao.quantization import quantize_

    config = float8_config()
    layers, errors = linear_layers(transformer), []
    if not layers:
        raise InputError(f"fp8 takes none of these linear layers: sizes must be multiples of {MULTIPLE}; {OFF}")
    total = sum(isinstance(module, nn.Linear) for module in transformer.blocks.modules())
    for layer in layers:
        inputs = sample(layer.weight)
        exact = layer(inputs)
        quantize_(layer, config)
        errors.append(((layer(inputs) - exact).norm() / exact.norm()).item())
    return Fp8Report(len(layers), total - len(layers), sum(errors) / len(errors), max(errors))


def linear_layers(transformer: WanTransformer3DModel) -> list[nn.Linear]:
    """The linear layers of the transformer's blocks that float8 products take: of fit sizes, without rows of zeros."""
    layers = [module for module in transformer.blocks.modules() if isinstance(module, nn.Linear)]
    fit = [layer for layer in layers if layer.in_features % MULTIPLE == 0 == layer.out_features % MULTIPLE]
    return [layer for layer in fit if layer.weight.any(dim=1).all()]


def float8_config() -> Any:
    """torchao's configuration: a scale a row, of weights and of inputs."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        # A row of zeros would have the scale zero, and become NaN.
        activation_value_lb=SMALLEST_ROW,
        # Else torchao sets options of torch.compile for the whole process: TF32 products, and minutes of tuning.
        set_inductor_config=False,
    )


def sample(weight: Tensor) -> Tensor:
    """Inputs to try a layer of this weight (out, in) with."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLE_ROWS, weight.shape[1], generator=generator).to(weight)
