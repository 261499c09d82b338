"""The models of a checkpoint, each where it waits for its turn and as it runs best there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from wan.caches.ran import blocks_left_out
from wan.checkpoints.component import Component
from wan.checkpoints.gguf_file import check_packed
from wan.checkpoints.lora import Adapter, read_lora
from wan.config.model_settings import ModelSettings
from wan.memory.decoding import vae_dtype_of
from wan.memory.load_plan import ComponentBytes, Placement, make_load_plan
from wan.memory.loading import changes_of, check_options, load_placed, move_to_wait, quantizations_of
from wan.memory.options import LoadOptions
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.fused_gelu import fuse_gelu
from wan.models.wan.names import NAMING
from wan.models.wan.processor import blocks_of
from wan.models.wan.vae import speed_up_decoder
from wan.quantize.float8 import FLOAT8

log = logging.getLogger("wan")


class LoadedModels(NamedTuple):
    """The models that a process needs; of those that share a video, one has the VAE and a text encoder not sharded.

    text_device: that the text encoder runs on
    offload: whether models that are idle leave the GPU
    """

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan | None
    text_encoder: UMT5EncoderModel | None
    tokenizer: PreTrainedTokenizerFast | None
    text_device: torch.device
    offload: bool


def load_models(checkpoint: Checkpoint, settings: ModelSettings, options: LoadOptions) -> LoadedModels:
    """Load the models of a checkpoint as settings say that `Checkpoint.resolve` gave.

    Raises `CheckpointError`, before any weight is read, for a checkpoint that is incomplete or damaged, and
    `InputError` for what does not go together.
    """
    device, dtype = options.device, getattr(torch, settings.dtype or "float32")
    vae_dtype = vae_dtype_of(settings.vae_dtype and getattr(torch, settings.vae_dtype), dtype, device.type)
    check_options(options, settings.fp8, dtype)

    # All of them before the first weight is read: what is missing or damaged should not cost minutes.
    vae_component = components.vae_component(checkpoint)
    text_component = components.text_encoder_component(checkpoint, dtype)
    transformer_component = components.transformer_component(checkpoint, settings.transformer_files.get(None))
    # Weights that a GGUF file has quantised stay so, and LoRA beside them.
    packed = check_packed(
        transformer_component, FLOAT8.key in quantizations_of(options, settings.fp8), options.dit_fsdp
    )
    adapters = [read_lora(file, transformer_component.model, NAMING) for file in settings.lora]

    sizes = ComponentBytes(*(one.bytes(dtype) for one in (transformer_component, text_component, vae_component)))
    plan = make_load_plan(options, settings.fp8, sizes)

    vae = _load_vae(vae_component, plan.vae, vae_dtype) if options.is_leader else None
    transformer = _load_transformer(transformer_component, plan.transformer, dtype, adapters, packed)
    text_encoder = None
    # Of a sharded one every process holds its part, whoever encodes.
    if options.is_leader or plan.text_encoder.mesh is not None:
        text_encoder = _load_text_encoder(text_component, plan.text_encoder, dtype)
    tokenizer = components.load_tokenizer(checkpoint, text_component.model.config.vocab_size)
    return LoadedModels(transformer, vae, text_encoder, tokenizer, plan.text_encoder.runs, plan.offload)


def _load_vae(component: Component, placement: Placement, decoder_dtype: torch.dtype) -> AutoencoderKLWan:
    # The encoder stays in float32; the decoder alone has a type of its own.
    vae = component.load(torch.float32, placement.reads_to)
    speed_up_decoder(vae, decoder_dtype)
    return vae


def _load_transformer(
    component: Component, placement: Placement, dtype: torch.dtype, adapters: Sequence[Adapter], packed: bool
) -> WanTransformer3DModel:
    quantizer, shard = changes_of(component, blocks_of(component.model), placement)
    transformer = components.load_transformer(component, dtype, placement.reads_to, shard, adapters, quantizer)
    for adapter in adapters:
        log.info("lora: %s, %s the weights", adapter.describe(), "beside" if packed else "merged into")
    # Before blocks are compiled or streamed: it changes what class a layer of theirs is of.
    fuse_gelu(transformer)
    if quantizer is not None:
        log.info("transformer: %s", quantizer.describe(placement.asked))
    move_to_wait(transformer, blocks_of(transformer), placement, blocks_left_out)
    return transformer


def _load_text_encoder(component: Component, placement: Placement, dtype: torch.dtype) -> UMT5EncoderModel:
    encoder, quantizer = load_placed(component, component.model.encoder.block, placement, dtype)
    if quantizer is not None:
        log.info("text encoder: %s", quantizer.describe(placement.asked))
    return encoder
