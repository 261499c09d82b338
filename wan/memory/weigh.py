"""What the weights of a model take, counted from shapes before any is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from wan.checkpoints.component import Component
from wan.checkpoints.gguf_file import GgufFile
from wan.checkpoints.tensor_files import weight_file
from wan.checkpoints.weights import WeightFiles
from wan.config.model_settings import LoraFile
from wan.files.formats import SAFETENSORS
from wan.memory.estimates import Weights


def weights_of(
    component: Component, blocks: nn.ModuleList, dtype: torch.dtype, lora: Sequence[LoraFile] = ()
) -> Weights:
    """What a component weighs in a dtype, and as its GGUF file has it, with LoRA files beside it."""
    own = weigh(component.model, blocks, dtype, component.float32)
    if not isinstance(component.weights, GgufFile):
        return own
    beside = sum(WeightFiles([weight_file("lora", one.file, (SAFETENSORS,))]).bytes(dtype) for one in lora)
    stored = _stored_layers(component, component.weights, blocks, dtype)
    return replace(own, stored=own.other + stored + math.ceil(beside / own.blocks))


def _stored_layers(component: Component, weights: GgufFile, blocks: nn.ModuleList, dtype: torch.dtype) -> int:
    """Bytes of the linear layers of a GGUF file's largest block."""
    prefix = next(f"{name}." for name, module in component.model.named_modules() if module is blocks)
    layers = {f"{name}.weight" for name, module in component.model.named_modules() if isinstance(module, nn.Linear)}
    sizes: Counter[str] = Counter()
    for name, shape in weights.shapes.items():
        own = component.names[name]
        if own.startswith(prefix) and own in layers:
            number = own.removeprefix(prefix).partition(".")[0]
            # What the file has in float32 or float16 is not packed, and gets the run's type.
            sizes[number] += weights.packed.get(name, math.prod(shape) * dtype.itemsize)
    return max(sizes.values())


def weigh(model: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype, float32: Sequence[str]) -> Weights:
    """What a model, which may be on the meta device, weighs in a dtype; `float32`: names of what stays in that."""

    def is_kept(name: str) -> bool:
        return bool(set(name.split(".")) & set(float32))

    def size(name: str, tensor: torch.Tensor) -> int:
        return tensor.numel() * (4 if is_kept(name) else dtype.itemsize)

    # One block stands for all, which are of the same sizes. Layers that stay in float32 are never quantised.
    layers = [(name, module) for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)]
    linear = [module.weight.numel() for name, module in layers if not is_kept(name)]

    inside = {id(parameter) for parameter in blocks.parameters()}
    named = list(model.named_parameters())
    in_blocks = sum(size(*item) for item in named if id(item[1]) in inside)
    rest = sum(size(*item) for item in named if id(item[1]) not in inside)
    other = in_blocks // len(blocks) - sum(linear) * dtype.itemsize
    return Weights(len(blocks), sum(linear), max(linear), max(0, other), rest, dtype.itemsize)
