"""A component of a checkpoint read to where it waits: quantised, sharded or streamed on the way, as its place says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from nabla import InputError
from wan.checkpoints.component import Component
from wan.memory.load_plan import Placement
from wan.memory.options import LoadOptions
from wan.memory.streaming import stream_blocks
from wan.parallel.fsdp import apply_fsdp
from wan.quantize.float8 import FLOAT8
from wan.quantize.quantizer import Quantizer, check_quantization, make_quantizer


def changes_of(
    component: Component, blocks: nn.ModuleList, placement: Placement
) -> tuple[Quantizer | None, Callable[[nn.Module], None] | None]:
    """What quantises weights while they are read, and what shards a model before."""
    quantizer = make_quantizer(
        component.model, blocks, placement.quantization, placement.runs, placement.reads_to, component.float32
    )
    shard = None if placement.mesh is None else partial(apply_fsdp, blocks=blocks, mesh=placement.mesh)
    return quantizer, shard


def load_placed(
    component: Component,
    blocks: nn.ModuleList,
    placement: Placement,
    dtype: torch.dtype,
    finish: Callable[[Any, torch.device], None] = lambda model, device: None,
) -> tuple[Any, Quantizer | None]:
    """A model that runs on its own, such as a text encoder, where it waits, and what has quantised it.

    finish: gives the model on a device what is not saved with its weights
    """
    quantizer, shard = changes_of(component, blocks, placement)
    model = component.load(dtype, placement.reads_to, shard, quantize=quantizer)
    finish(model, placement.reads_to)
    move_to_wait(model, blocks, placement)
    return model, quantizer


def move_to_wait(
    model: nn.Module,
    blocks: nn.ModuleList,
    placement: Placement,
    left_out: Callable[[nn.Module], bool] | None = None,
    always: int = 1,
) -> None:
    """Bring a model that was read to where it waits, its blocks streamed from there if the plan says so.

    left_out, always: as of `wan.memory.streaming.stream_blocks`
    """
    if placement.kept is not None:
        kept = min(placement.kept, len(blocks))
        stream_blocks(model, list(blocks), placement.runs, kept, placement.pinned, left_out, always)
    elif placement.mesh is None and placement.reads_to != placement.waits:
        model.to(placement.waits)


def check_options(options: LoadOptions, fp8: bool, dtype: torch.dtype) -> None:
    """Raise `InputError` for what does not go together, or cannot be quantised so on the device."""
    for name, asked in (("dit_fsdp", options.dit_fsdp), ("t5_fsdp", options.t5_fsdp)):
        if asked and options.processes_per_video == 1:
            raise InputError(f"{name} shards over processes that share a video, and here none do; leave it out")
    if options.dit_fsdp and fp8:
        raise InputError("dit_fsdp and fp8 do not work together; leave one of them out")
    if options.t5_fsdp and options.t5_cpu:
        raise InputError("t5_fsdp and t5_cpu exclude each other; leave one of them out")
    if options.t5_fsdp and options.expand_prompt:
        raise InputError("t5_fsdp and expand_prompt do not work together; leave one of them out")
    if options.plan is not None and options.distributed is not None:
        raise InputError("a plan of memory is for one process; leave it out, or processes")
    for key in quantizations_of(options, fp8):
        check_quantization(key, options.device, dtype)


def quantizations_of(options: LoadOptions, fp8: bool) -> tuple[str | None, ...]:
    """The keys of the transformer's quantisation and of the text encoder's."""
    if options.plan is not None:
        return options.plan.quantization, options.plan.text_quantization
    return FLOAT8.key if fp8 else None, None
