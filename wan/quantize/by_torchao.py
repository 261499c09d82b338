"""What quantisations by torchao, an optional requirement, have in common."""

from __future__ import annotations

import importlib.util

from torch import Tensor, nn

from nabla import InputError


def require_torchao(key: str) -> None:
    """Raise `InputError` if torchao is not installed, for a quantisation of this key."""
    if importlib.util.find_spec("torchao") is None:
        raise InputError(f"{key} weights need torchao, which is not installed; pip install -r requirements-fp8.txt")


def quantize_weight(weight: Tensor, config: object) -> Tensor:
    """A weight (out, in) as torchao quantises the layer that it is of."""
    from torchao.quantization import quantize_

    # torchao takes modules, not tensors; this one, on the meta device, costs nothing.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, config)
    return layer.weight
