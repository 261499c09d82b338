"""A run's plan of memory: what its models weigh, what is free, and the planner's choice between the two."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nabla import InputError
from wan.checkpoints.gguf_file import GgufFile, check_packed
from wan.checkpoints.weights import Part, WeightFiles, weight_file
from wan.config.cache_settings import COPIES
from wan.config.settings import LoraFile, Settings
from wan.files.formats import SAFETENSORS
from wan.memory.estimates import GGUF, Weights, Work
from wan.memory.placement import free_bytes
from wan.memory.planner import GB, Budget, Plan, choose
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components as parts
from wan.models.wan.vae import vae_dtype_of

log = logging.getLogger("wan")

AUTO = "auto"
# The limit and the use of a container's memory, in the second and the first version of cgroups.
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
# What CUDA and its libraries hold beside the memory that torch gives out.
CONTEXT = int(0.7 * GB)


def parse_memory(text: str) -> str | float:
    """`auto`, or GB to stay under; raises `InputError` for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if text == AUTO or (math.isfinite(number) and number > 0):
        return text if text == AUTO else number
    raise InputError(f"memory {text!r} is neither auto nor GB to stay under; 24 suits a card of 24 GB")


def check_memory(memory: str | float | None, device: torch.device, processes: object, offload: bool | None) -> None:
    """Raise `InputError` for what a plan of memory does not go with."""
    if memory is None:
        return
    if device.type != "cuda":
        raise InputError(f"memory {memory} plans the memory of a GPU, and this runs on {device}; leave it out")
    if processes is not None:
        raise InputError("memory plans for one process, and torchrun starts several; use dit_fsdp and t5_fsdp there")
    if offload is not None:
        raise InputError("memory decides what is offloaded; leave offload_model out, or memory")


def plan_run(
    checkpoint: Checkpoint,
    several: Sequence[Settings],
    device: torch.device,
    memory: str | float,
    compiled: bool | None = None,
    t5_cpu: bool = False,
) -> Plan:
    """The plan for videos of one checkpoint, said in a line, and torch's memory on the device limited to what it has.

    Raises `InputError` if they cannot fit, before any weight is read.
    """
    settings, dtype = several[0], getattr(torch, several[0].dtype)
    transformer = parts.transformer_part(checkpoint, settings.transformer)
    packing = GGUF if check_packed(transformer, fp8=settings.fp8) else "fp8" if settings.fp8 else None
    text, vae = parts.text_encoder_part(checkpoint, dtype), parts.vae_part(checkpoint)
    vae_dtype = vae_dtype_of(settings.vae_dtype and getattr(torch, settings.vae_dtype), dtype)
    budget, has_torchao = budget_of(device, memory), importlib.util.find_spec("torchao") is not None
    works = [work_of(transformer.model, text.model, vae.model, one, dtype, vae_dtype, compiled) for one in several]
    plan = choose(
        weights_of(transformer, transformer.model.blocks, dtype, settings.lora),
        weights_of(text, text.model.encoder.block, dtype),
        vae.bytes(torch.float32),
        max(works, key=lambda work: (work.tokens, math.prod(work.size))),
        budget,
        packing,
        can_pack=dtype == torch.bfloat16 and has_torchao,
        text_cpu=t5_cpu,
    )
    log.info("memory: %s", plan.describe(budget, settings.dtype))
    if not has_torchao:
        log.info("memory: weights in int8 and int4 need torchao, which is not installed, so they were left out")
    limit(device, budget)
    return plan


def weights_of(part: Part, blocks: nn.ModuleList, dtype: torch.dtype, lora: Sequence[LoraFile] = ()) -> Weights:
    """What a part of a checkpoint weighs in a dtype, and as its GGUF file packs it, with LoRA files beside it."""
    own = weigh(part.model, blocks, dtype, part.float32)
    if not isinstance(part.weights, GgufFile):
        return own
    beside = sum(WeightFiles([weight_file("lora", one.file, (SAFETENSORS,))]).bytes(dtype) for one in lora)
    return replace(own, stored=own.other + _stored_layers(part, dtype) + math.ceil(beside / own.blocks))


def _stored_layers(part: Part, dtype: torch.dtype) -> int:
    """Bytes of the linear layers of a GGUF file's largest block."""
    layers = {f"{name}.weight" for name, module in part.model.named_modules() if isinstance(module, nn.Linear)}
    sizes: Counter[str] = Counter()
    for name, shape in part.weights.shapes.items():
        place, _, number = part.names[name].partition(".")
        if place == "blocks" and part.names[name] in layers:
            sizes[number.partition(".")[0]] += part.weights.packed.get(name, math.prod(shape) * dtype.itemsize)
    return max(sizes.values())


def weigh(model: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype, float32: Sequence[str]) -> Weights:
    """What a model, which may be on the meta device, weighs in a dtype; `float32`: names of what stays in that."""
    linear = [module.weight.numel() for module in blocks[0].modules() if isinstance(module, nn.Linear)]

    def size(name: str, tensor: torch.Tensor) -> int:
        return tensor.numel() * (4 if set(name.split(".")) & set(float32) else dtype.itemsize)

    inside = {id(parameter) for parameter in blocks.parameters()}
    named = list(model.named_parameters())
    in_blocks = sum(size(*item) for item in named if id(item[1]) in inside)
    rest = sum(size(*item) for item in named if id(item[1]) not in inside)
    other = in_blocks // len(blocks) - sum(linear) * dtype.itemsize
    return Weights(len(blocks), sum(linear), max(linear), max(0, other), rest, dtype.itemsize)


def work_of(
    transformer: nn.Module,
    text: nn.Module,
    vae: nn.Module,
    settings: Settings,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    compiled: bool | None,
) -> Work:
    """A video and the widths of the models that make it."""
    own = transformer.config
    return Work(
        tokens=math.prod(settings.video.token_grid),
        dim=own.num_attention_heads * own.attention_head_dim,
        ffn_dim=own.ffn_dim,
        heads=own.num_attention_heads,
        text_dim=text.config.d_model,
        size=settings.video.size,
        frames=settings.video.frame_num,
        itemsize=dtype.itemsize,
        vae_itemsize=vae_dtype.itemsize,
        vae_width=vae.config.base_dim,
        compiled=compiled is not False,
        mask_layers=own.num_layers if settings.attention.mask_refresh > 1 else 0,
        cached=0 if settings.cache is None else COPIES[settings.cache.kind],
    )


def budget_of(device: torch.device, memory: str | float) -> Budget:
    """Free bytes of a GPU and of the host; a number of GB is for all of the process, CUDA's own memory included."""
    free, besides = free_bytes(device), CONTEXT + torch.cuda.memory_allocated(device)
    gpu = free if memory == AUTO else min(free, max(0, int(memory * GB) - besides))
    return Budget(gpu, *host_bytes(), besides)


def host_bytes() -> tuple[int, int]:
    """(free, total) bytes of host memory, of this container if it has a limit."""
    table = Path("/proc/meminfo")
    if not table.is_file():
        raise InputError(f"memory cannot tell how much host memory is free: there is no {table} here; leave it out")
    lines = (line.split(":") for line in table.read_text().splitlines())
    found = {name: int(value.split()[0]) * 1024 for name, value in lines}
    free, total = found["MemAvailable"], found["MemTotal"]
    folder = Path("/sys/fs/cgroup")
    for most, now in CGROUP_FILES:
        if (folder / most).is_file() and (text := (folder / most).read_text().strip()).isdecimal():
            # Cached files count as used there, but make room.
            total = min(total, int(text))
            free = min(free, max(0, total - int((folder / now).read_text()) + _cached(folder / most)))
    return free, total


def _cached(limit: Path) -> int:
    stat = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))


def limit(device: torch.device, budget: Budget) -> None:
    """Keep torch from taking more of a GPU than a budget beside what it has, in this process from now on."""
    total = torch.cuda.get_device_properties(device).total_memory
    most = budget.gpu + torch.cuda.memory_allocated(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device.index)
