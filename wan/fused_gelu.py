"""GELU in the epilogue of the matrix product before it, which torch.compile leaves as a pass over memory of its own."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.activations import GELU
from torch import Tensor, nn


def fuse_gelu(transformer: WanTransformer3DModel) -> None:
    """Fuse GELU into the first product of every feed-forward on a GPU, in place; in training nothing is fused."""
    for block in transformer.blocks:
        gelu = block.ffn.net[0]
        if isinstance(gelu, GELU) and gelu.approximate == "tanh":
            gelu.forward = functools.partial(_forward, gelu)


def unfuse_gelu(transformer: WanTransformer3DModel) -> None:
    """Undo `fuse_gelu`; nothing happens to others."""
    for block in transformer.blocks:
        gelu = block.ffn.net[0]
        if getattr(gelu.__dict__.get("forward"), "func", None) is _forward:
            del gelu.forward


def _forward(gelu: GELU, hidden: Tensor) -> Tensor:
    """As diffusers does it, but for a plain layer of a plain tensor: not one of LoRA, of float8 or with hooks."""
    layer = gelu.proj
    is_plain = type(layer) is nn.Linear and type(layer.weight) in (Tensor, nn.Parameter) and layer.bias is not None
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    half = hidden.dtype in (torch.bfloat16, torch.float16) and layer.weight.dtype == hidden.dtype
    if is_plain and not hooked and half and hidden.is_cuda and not torch.is_grad_enabled():
        return linear_gelu(hidden, layer.weight, layer.bias)
    return F.gelu(layer(hidden), approximate="tanh")


@torch.library.custom_op("wan::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x @ weight.T + bias), approximated by tanh. An operator, since the compiler would take it apart again."""
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], weight.shape[0])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
