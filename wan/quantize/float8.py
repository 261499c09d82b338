"""Linear layers in float8, by torchao (an optional requirement): a scale a row for weights, stored, and for inputs,
found at run time; products are summed in float32 and come out in the layer's dtype.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from nabla import InputError
from wan.quantize.by_torchao import quantize_weight
from wan.quantize.quantization import Quantization

# Of settings, flags and records.
KEY = "fp8"
# The first GPUs with float8 matrix units (Ada), and the sizes that their products are multiples of.
ADA = 8, 9
MULTIPLE = 16
# Of a row's largest value: smaller than any that matters, and its 448th part, the scale, is still a normal float32.
SMALLEST_ROW = 1e-30
OFF = "leave fp8 out, or --fp8 false where a config asks for it"


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise `InputError` if float8 layers cannot run on a device, in a model of `dtype`."""
    needs = f"fp8 does not work on {device}: it needs an NVIDIA GPU of compute capability 8.9 or more"
    if device.type != "cuda":
        raise InputError(f"{needs}; {OFF}")
    if dtype != torch.bfloat16:
        raise InputError(f"fp8 works in bfloat16 only, not in {str(dtype).removeprefix('torch.')}; choose one of them")
    if torch.version.hip or torch.cuda.get_device_capability(device) < ADA:
        raise InputError(f"{needs}; {OFF}")
    if importlib.util.find_spec("torchao") is None:
        raise InputError(f"fp8 needs torchao, which is not installed; pip install torchao, or {OFF}")


def takes(weight: Tensor) -> bool:
    """Whether float8 products take a weight: of fit sizes, without a row of zeros, the scale of which would be zero."""
    fits = weight.shape[0] % MULTIPLE == 0 == weight.shape[1] % MULTIPLE
    return fits and bool(weight.any(dim=1).all())


def quantize(weight: Tensor) -> Tensor:
    """torchao's tensor for a weight (out, in)."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        # A row of zeros would have the scale zero, and become NaN.
        activation_value_lb=SMALLEST_ROW,
        # Else torchao sets options of torch.compile for the whole process: TF32 products, and minutes of tuning.
        set_inductor_config=False,
    )
    return quantize_weight(weight, config)


# Never chosen by a plan: it is faster than int8, but as large and less exact.
FLOAT8 = Quantization(
    key=KEY,
    name="float8",
    # Its share of a scale for a whole row is next to nothing.
    bytes_per_weight=1.01,
    quantize=quantize,
    takes=takes,
    check=check,
    making_bytes=12,
    speed=2.0,
    sizes=f"sizes must be multiples of {MULTIPLE}; {OFF}",
)
