"""The models of a checkpoint, each where it waits for its turn and as it runs best there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel
from torch import nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from wan.caches.ran import blocks_left_out
from wan.checkpoints.component import Component
from wan.checkpoints.lora import Adapter, read_lora
from wan.config.model_settings import ModelSettings
from wan.memory.decoding import vae_dtype_of
from wan.memory.load_plan import ComponentBytes, Placement, make_load_plan
from wan.memory.loading import changes_of, check_options, load_placed, move_to_wait
from wan.memory.options import LoadOptions
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky import components
from wan.models.kandinsky.expand import Expander, language_model_of, make_expander
from wan.models.kandinsky.names import NAMING
from wan.models.kandinsky.processor import all_blocks
from wan.models.kandinsky.text import CLIP_DTYPE
from wan.models.kandinsky.vae import prepare_decoder

log = logging.getLogger("wan")


class LoadedModels(NamedTuple):
    """The models that a process needs; of those that share a video, one has the VAE and text encoders not sharded.

    expander: what writes prompts, around the same language model; None where none are written
    text_device: that the text encoders run on
    offload: whether models that are idle leave the GPU
    """

    transformer: Kandinsky5Transformer3DModel
    vae: AutoencoderKLHunyuanVideo | None
    text_encoder: Qwen2_5_VLTextModel | None
    text_encoder_2: CLIPTextModel | None
    tokenizer: PreTrainedTokenizerFast | None
    tokenizer_2: PreTrainedTokenizerFast | None
    expander: Expander | None
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
    qwen, clip = _qwen_component(checkpoint, options), components.text_encoder_2_component(checkpoint)
    transformer_component = components.transformer_component(checkpoint, settings.transformer_files.get(None))
    adapters = [read_lora(file, transformer_component.model, NAMING) for file in settings.lora]

    text_bytes = qwen.bytes(dtype) + clip.bytes(CLIP_DTYPE)
    sizes = ComponentBytes(transformer_component.bytes(dtype), text_bytes, vae_component.bytes(dtype))
    plan = make_load_plan(options, settings.fp8, sizes)

    vae = _load_vae(vae_component, plan.vae, vae_dtype) if options.is_leader else None
    transformer = _load_transformer(transformer_component, plan.transformer, dtype, adapters)
    text_encoder = text_encoder_2 = expander = None
    # Of a sharded one every process holds its part, whoever encodes.
    if options.is_leader or plan.text_encoder.mesh is not None:
        model = _load_text_encoder(qwen, plan.text_encoder, dtype)
        text_encoder = language_model_of(model)
    if options.is_leader:
        text_encoder_2 = _load_clip(clip, plan.text_encoder)
    vocabularies = language_model_of(qwen.model).config.vocab_size, clip.model.config.vocab_size
    tokenizers = [
        components.load_tokenizer(checkpoint, *one) for one in zip(checkpoint.family.tokenizers, vocabularies)
    ]
    if options.expand_prompt and options.is_leader:
        expander = make_expander(model, tokenizers[0], checkpoint)
    runs, offload = plan.text_encoder.runs, plan.offload
    return LoadedModels(transformer, vae, text_encoder, text_encoder_2, *tokenizers, expander, runs, offload)


def _qwen_component(checkpoint: Checkpoint, options: LoadOptions) -> Component:
    if options.expand_prompt:
        return components.writer_component(checkpoint, options.expand_pictures)
    return components.text_encoder_component(checkpoint)


def _load_vae(component: Component, placement: Placement, decoder_dtype: torch.dtype) -> AutoencoderKLHunyuanVideo:
    # The encoder stays in float32; the decoder alone has a type of its own.
    vae = component.load(torch.float32, placement.reads_to)
    prepare_decoder(vae, decoder_dtype)
    return vae


def _load_transformer(
    component: Component, placement: Placement, dtype: torch.dtype, adapters: Sequence[Adapter]
) -> Kandinsky5Transformer3DModel:
    # Those of the text as well: what is in no block is there whole through every forward, 2.1 GB of Pro.
    blocks = all_blocks(component.model)
    quantizer, shard = changes_of(component, blocks, placement)
    transformer = components.load_transformer(component, dtype, placement.reads_to, shard, adapters, quantizer)
    for adapter in adapters:
        log.info("lora: %s, merged into the weights", adapter.describe())
    if quantizer is not None:
        log.info("transformer: %s", quantizer.describe(placement.asked))
    # A step cache leaves out visual blocks alone, and decides by the first of them.
    always = len(transformer.text_transformer_blocks) + 1
    move_to_wait(transformer, blocks, placement, blocks_left_out, always)
    return transformer


def _load_text_encoder(component: Component, placement: Placement, dtype: torch.dtype) -> nn.Module:
    """The language model alone, or within the model that writes, whichever the component is of."""
    finish, language = components.finish_text_encoder, language_model_of(component.model)
    encoder, quantizer = load_placed(component, language.layers, placement, dtype, finish)
    if encoder is not language and hasattr(encoder, "block_stream"):
        # Whichever of the two runs, it opens the same stream.
        language.block_stream = encoder.block_stream
    if quantizer is not None:
        log.info("text encoder: %s", quantizer.describe(placement.asked))
    return encoder


def _load_clip(component: Component, placement: Placement) -> CLIPTextModel:
    # A small model, which is neither streamed nor quantised.
    encoder = component.load(CLIP_DTYPE, placement.waits)
    components.finish_text_encoder(encoder, placement.waits)
    return encoder
