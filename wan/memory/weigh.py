"""What the weights of a model take, counted from shapes before any is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
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
    inside, model = {id(block) for block in blocks}, component.model
    prefixes = {f"{name}." for name, module in model.named_modules() if id(module) in inside}
    layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sizes: Counter[str] = Counter()
    for name, shape in weights.shapes.items():
        own = component.names[name]
        # The list's name and the number in it.
        prefix = "".join(f"{part}." for part in own.split(".")[:2])
        if own in layers and prefix in prefixes:
            # What the file has in float32 or float16 is not packed, and gets the run's type.
            sizes[prefix] += weights.packed.get(name, math.prod(shape) * dtype.itemsize)
    return max(sizes.values())


def weigh(model: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype, float32: Sequence[str]) -> Weights:
    """What a model, which may be on the meta device, weighs in a dtype.

    blocks: those that are streamed and quantised, of one list of the model or of several
    float32: names of what stays in that
    """

    def is_kept(name: str) -> bool:
        return bool(set(name.split(".")) & set(float32))

    def size(parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
        return sum(one.numel() * (4 if is_kept(name) else dtype.itemsize) for name, one in parameters)

    # Layers that stay in float32 are never quantised.
    layers = [
        [m.weight.numel() for name, m in block.named_modules() if isinstance(m, nn.Linear) and not is_kept(name)]
        for block in blocks
    ]
    linear = [sum(numbers) for numbers in layers]
    other = [size(block.named_parameters()) - n * dtype.itemsize for block, n in zip(blocks, linear)]
    inside = {id(parameter) for parameter in blocks.parameters()}
    rest = size(item for item in model.named_parameters() if id(item[1]) not in inside)
    count = len(blocks)
    return Weights(
        count,
        max(linear),
        max(map(max, layers)),
        max(other),
        rest,
        dtype.itemsize,
        less_linear=count * max(linear) - sum(linear),
        less_other=count * max(other) - sum(other),
    )
