"""GELU in the epilogue of the matrix product before it, which torch.compile leaves as a pass over memory of its own."""

from __future__ import annotations

import math

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.activations import GELU
from torch import Tensor, nn

from wan.models.wan.processor import blocks_of


def fuse_gelu(transformer: WanTransformer3DModel) -> None:
    """Fuse GELU into the first product of every feed-forward on a GPU, in place; in training nothing is fused."""
    _replace(transformer, GELU, FusedGELU)


def unfuse_gelu(transformer: WanTransformer3DModel) -> None:
    """Undo `fuse_gelu`; nothing happens to others."""
    _replace(transformer, FusedGELU, GELU)


def _replace(transformer: WanTransformer3DModel, old: type[GELU], new: type[GELU]) -> None:
    for block in blocks_of(transformer):
        gelu = block.ffn.net[0]
        if type(gelu) is old and gelu.approximate == "tanh":
            # Not a forward of the instance, for which the compiler would make a graph a block.
            gelu.__class__ = new


class FusedGELU(GELU):
    """As diffusers does it, but for a plain layer of a plain tensor: not one of LoRA, of float8 or with hooks."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        layer = self.proj
        # No derived classes: those of GGUF, of torchao and of LoRA compute something else.
        is_plain = type(layer) is nn.Linear and type(layer.weight) in (Tensor, nn.Parameter) and layer.bias is not None
        hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
        # The operator casts nothing, and has no backward.
        half = hidden_states.dtype in (torch.bfloat16, torch.float16) and layer.weight.dtype == hidden_states.dtype
        if is_plain and not hooked and half and hidden_states.is_cuda and not torch.is_grad_enabled():
            return linear_gelu(hidden_states, layer.weight, layer.bias)
        if torch.compiler.is_compiling() and hidden_states.is_cuda and not torch.is_grad_enabled():
            return gelu_by_sigmoid(layer(hidden_states))
        return super().forward(hidden_states)


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """GELU approximated by tanh, as the same function of one exponential; for compiled code, in which it is one pass.

    A conversion to float8 behind it computes it twice, and by the compiler's tanh takes longer than the memory.
    """
    # x / 2 (1 + tanh u) = x sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
    wide = x.float()
    return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * wide * (1 + 0.044715 * wide * wide))).to(x.dtype)


@torch.library.custom_op("wan::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x @ weight.T + bias), approximated by tanh. An operator, since the compiler would take it apart again.

    x: (..., in); weight: (out, in); bias: (out,); result (..., out)
    """
    # One product of matrices, with bias and GELU in its epilogue: (rows, in) @ (in, out).
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], weight.shape[0])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
