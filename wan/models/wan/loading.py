"""The models of a checkpoint, each where it waits for its turn and as it runs best there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from nabla import InputError
from wan.caches.ran import blocks_left_out
from wan.checkpoints.gguf_file import check_packed
from wan.checkpoints.lora import read_lora
from wan.config.settings import LoraFile
from wan.memory import placement as memory
from wan.memory.planner import MemoryPlan
from wan.memory.streaming import stream_blocks
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.fused_gelu import fuse_gelu
from wan.models.wan.names import NAMING
from wan.models.wan.vae import speed_up_decoder, vae_dtype_of
from wan.parallel.distributed import DistributedContext
from wan.parallel.fsdp import apply_fsdp
from wan.quantize.gguf import GGUF
from wan.quantize.quantizer import check_quantization, make_quantizer, quantize_layers

log = logging.getLogger("wan")

MERGED, BESIDE = "merged into", "beside"


class Models(NamedTuple):
    """The models that a process needs; of those that share a video, one has the VAE and a text encoder not sharded."""

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan | None
    text_encoder: UMT5EncoderModel | None
    tokenizer: PreTrainedTokenizerFast | None
    offload: bool


def load_models(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None,
    fp8: bool,
    offload: bool | None,
    t5_cpu: bool,
    processes: DistributedContext | None = None,
    dit_fsdp: bool = False,
    t5_fsdp: bool = False,
    transformer_file: str | Path | None = None,
    lora: Sequence[LoraFile] = (),
    plan: MemoryPlan | None = None,
) -> Models:
    """Load the models of a checkpoint; see `WanT2V.from_pretrained` for the arguments.

    Raises `CheckpointError`, before any weight is read, for a checkpoint that is incomplete or damaged, and
    `InputError` for what does not go together.
    """
    _check_sharding(processes, dit_fsdp, t5_fsdp, fp8, t5_cpu)
    if plan is not None:
        if processes is not None:
            raise InputError("a plan of memory is for one process; leave it out, or processes")
        return _load_planned(checkpoint, device, dtype, vae_dtype, transformer_file, lora, plan)
    if fp8:
        check_quantization("fp8", device, dtype)
    cpu = torch.device("cpu")
    vae_component, text_component = (
        components.vae_component(checkpoint),
        components.text_encoder_component(checkpoint, dtype),
    )
    transformer_component = components.transformer_component(checkpoint, transformer_file)
    packed = check_packed(transformer_component, fp8, dit_fsdp)
    adapters = [read_lora(file, transformer_component.model, NAMING) for file in lora]
    is_leader = processes is None or processes.is_leader
    if offload is None:
        sharing = processes.layout.processes_per_video if processes else 1
        need = transformer_component.bytes(dtype) // (sharing if dit_fsdp else 1)
        need += vae_component.bytes(dtype) if is_leader else 0
        need += (
            text_component.bytes(dtype) // (sharing if t5_fsdp else 1) if (is_leader or t5_fsdp) and not t5_cpu else 0
        )
        offload = memory.is_crowded(device, need)
        if offload and sharing > 1 and not dit_fsdp:
            log.warning("warning: idle weights move to host memory, a copy for each process; --dit_fsdp shards them")
    home = cpu if offload else device
    vae = text_encoder = None
    if is_leader:
        vae = vae_component.load(torch.float32, home)
        speed_up_decoder(vae, vae_dtype_of(vae_dtype, dtype, device.type))
    if t5_fsdp:
        text_encoder = text_component.load(
            dtype, device, lambda model: apply_fsdp(model, model.encoder.block, processes.video_mesh)
        )
    elif is_leader:
        text_encoder = text_component.load(dtype, cpu if t5_cpu else home)
    if dit_fsdp:
        transformer = components.load_transformer(
            transformer_component,
            dtype,
            device,
            lambda model: apply_fsdp(model, model.blocks, processes.video_mesh),
            adapters,
        )
    else:
        transformer = components.load_transformer(
            transformer_component, dtype, device if fp8 else home, adapters=adapters
        )
    for adapter in adapters:
        log.info("lora: %s, %s the weights", adapter.describe(), BESIDE if packed else MERGED)
    fuse_gelu(transformer)
    if fp8:
        log.info("transformer: %s", quantize_layers(transformer, transformer.blocks, "fp8", device).describe("float8"))
        transformer.to(home)
    tokenizer = components.load_tokenizer(checkpoint, text_component.model.config.vocab_size)
    return Models(transformer, vae, text_encoder, tokenizer, offload)


def _load_planned(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None,
    transformer_file: str | Path | None,
    lora: Sequence[LoraFile],
    plan: MemoryPlan,
) -> Models:
    """The models where a plan of memory has them, their weights packed one at a time while they are read."""
    for quantization in (plan.quantization, plan.text_quantization):
        check_quantization(quantization, device, dtype)
    cpu = torch.device("cpu")
    home = cpu if plan.in_turns else device
    vae = components.vae_component(checkpoint).load(torch.float32, home)
    speed_up_decoder(vae, vae_dtype_of(vae_dtype, dtype, device.type))
    transformer_component = components.transformer_component(checkpoint, transformer_file)
    adapters = [read_lora(file, transformer_component.model, NAMING) for file in lora]
    quantizer = make_quantizer(
        transformer_component.model, transformer_component.model.blocks, plan.quantization, device, home
    )
    transformer = components.load_transformer(transformer_component, dtype, home, adapters=adapters, quantize=quantizer)
    for adapter in adapters:
        log.info("lora: %s, %s the weights", adapter.describe(), BESIDE if plan.quantization == GGUF.key else MERGED)
    fuse_gelu(transformer)
    if quantizer is not None:
        log.info("transformer: %s", quantizer.describe())
    if plan.in_turns:
        stream_blocks(transformer, transformer.blocks, device, plan.kept, plan.pinned, blocks_left_out)
    text_component = components.text_encoder_component(checkpoint, dtype)
    text_device = cpu if plan.text == "cpu" else device
    text_home = cpu if plan.text == "cpu" else home
    quantizer = make_quantizer(
        text_component.model, text_component.model.encoder.block, plan.text_quantization, text_device, text_home
    )
    text_encoder = text_component.load(dtype, text_home, quantize=quantizer)
    if quantizer is not None:
        log.info("text encoder: %s", quantizer.describe())
    if plan.text == "stream" or (plan.in_turns and quantizer is not None and plan.text != "cpu"):
        kept = 0 if plan.text == "stream" else len(text_encoder.encoder.block)
        stream_blocks(text_encoder, text_encoder.encoder.block, device, kept, plan.pinned)
    tokenizer = components.load_tokenizer(checkpoint, text_component.model.config.vocab_size)
    return Models(transformer, vae, text_encoder, tokenizer, plan.in_turns)


def _check_sharding(
    processes: DistributedContext | None, dit_fsdp: bool, t5_fsdp: bool, fp8: bool, t5_cpu: bool
) -> None:
    for name, asked in (("dit_fsdp", dit_fsdp), ("t5_fsdp", t5_fsdp)):
        if asked and (processes is None or processes.layout.processes_per_video == 1):
            raise InputError(f"{name} shards over processes that share a video, and here none do; leave it out")
    if dit_fsdp and fp8:
        raise InputError("dit_fsdp and fp8 do not work together; leave one of them out")
    if t5_fsdp and t5_cpu:
        raise InputError("t5_fsdp and t5_cpu exclude each other; leave one of them out")
