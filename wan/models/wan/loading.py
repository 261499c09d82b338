"""The models of a checkpoint, each where it waits for its turn and as it runs best there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionModel, PreTrainedTokenizerFast, UMT5EncoderModel

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
from wan.models.wan.image_encoder import image_encoder_component, load_image_encoder
from wan.models.wan.kinds import kind_of
from wan.models.wan.names import NAMING
from wan.models.wan.processor import VACE_TRANSFORMER, blocks_of
from wan.models.wan.vae import speed_up_decoder, speed_up_encoder
from wan.quantize.float8 import FLOAT8

log = logging.getLogger("wan")

# Pieces of the names of layers that a text-to-video transformer does not have.
PICTURE_LAYERS = ("add_k_proj", "add_v_proj", "norm_added_k", "image_embedder")
VACE_LAYERS = ("vace_",)


class LoadedModels(NamedTuple):
    """The models that a process needs; of those that share a video, one has the VAE and a text encoder not sharded.

    transformer_2, boundary: of a checkpoint of two experts, the one of low noise and where it takes over
    text_device: that the text encoder runs on
    offload: whether models that are idle leave the GPU
    """

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan | None
    text_encoder: UMT5EncoderModel | None
    tokenizer: PreTrainedTokenizerFast | None
    text_device: torch.device
    offload: bool
    transformer_2: WanTransformer3DModel | None = None
    boundary: float | None = None
    image_encoder: CLIPVisionModel | None = None


class _Expert(NamedTuple):
    """A transformer before its weights are read, the only one or one of two.

    packed: whether its weights are those of GGUF, which stay so, and LoRA beside them
    """

    name: str | None
    component: Component
    adapters: Sequence[Adapter]
    packed: bool


def load_models(checkpoint: Checkpoint, settings: ModelSettings, options: LoadOptions) -> LoadedModels:
    """Load the models of a checkpoint as settings say that `Checkpoint.resolve` gave.

    Raises `CheckpointError`, before any weight is read, for a checkpoint that is incomplete or damaged, and
    `InputError` for what does not go together.
    """
    device, dtype = options.device, getattr(torch, settings.dtype or "float32")
    vae_dtype = vae_dtype_of(settings.vae_dtype and getattr(torch, settings.vae_dtype), dtype, device.type)
    check_options(options, settings.fp8, dtype)

    # All of them before the first weight is read: what is missing or damaged should not cost minutes.
    kind = kind_of(checkpoint.layout)
    vae_component = components.vae_component(checkpoint)
    image_component = image_encoder_component(checkpoint) if kind.sees_pictures else None
    text_component = components.text_encoder_component(checkpoint, dtype)
    experts = _open_experts(checkpoint, settings, options)

    sizes = ComponentBytes(
        sum(one.component.bytes(dtype) for one in experts),
        text_component.bytes(dtype),
        vae_component.bytes(dtype),
        0 if image_component is None else image_component.bytes(torch.float32),
    )
    plan = make_load_plan(options, settings.fp8, sizes)

    vae = image_encoder = text_encoder = None
    if options.is_leader:
        vae = _load_vae(vae_component, plan.vae, vae_dtype, bool(kind.inputs.taken))
        if image_component is not None:
            image_encoder = load_image_encoder(image_component, plan.vae.waits)
    transformers = [_load_transformer(one, plan.transformer, dtype) for one in experts]
    # Of a sharded one every process holds its part, whoever encodes.
    if options.is_leader or plan.text_encoder.mesh is not None:
        text_encoder = _load_text_encoder(text_component, plan.text_encoder, dtype)
    return LoadedModels(
        transformer=transformers[0],
        transformer_2=transformers[1] if len(transformers) > 1 else None,
        boundary=checkpoint.boundary,
        vae=vae,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        tokenizer=components.load_tokenizer(checkpoint, text_component.model.config.vocab_size),
        text_device=plan.text_encoder.runs,
        offload=plan.offload,
    )


def _open_experts(checkpoint: Checkpoint, settings: ModelSettings, options: LoadOptions) -> list[_Expert]:
    """The transformers of a checkpoint in the order in which they run, each with the LoRA files that are for it."""
    files, fp8 = settings.transformer_files, FLOAT8.key in quantizations_of(options, settings.fp8)
    opened = []
    for name in kind_of(checkpoint.layout).experts or (None,):
        component = components.transformer_component(checkpoint, files.get(name), name)
        packed = check_packed(component, fp8, options.dit_fsdp)
        adapters = [read_lora(file, component.model, NAMING) for file in settings.lora_of(name)]
        opened.append(_Expert(name, component, adapters, packed))
    return opened


def _load_vae(
    component: Component, placement: Placement, decoder_dtype: torch.dtype, encodes: bool
) -> AutoencoderKLWan:
    # The encoder stays in float32; the decoder alone has a type of its own.
    vae = component.load(torch.float32, placement.reads_to)
    speed_up_decoder(vae, decoder_dtype)
    if encodes:
        speed_up_encoder(vae, torch.float32)
    return vae


def _load_transformer(expert: _Expert, placement: Placement, dtype: torch.dtype) -> WanTransformer3DModel:
    component, adapters = expert.component, expert.adapters
    quantizer, shard = changes_of(component, blocks_of(component.model), placement)
    transformer = components.load_transformer(component, dtype, placement.reads_to, shard, adapters, quantizer)
    which = "transformer" if expert.name is None else f"{expert.name}-noise expert"
    for adapter in adapters:
        whose = "the weights" if expert.name is None else f"the weights of the {which}"
        how = "beside" if expert.packed else "merged into"
        log.info("lora: %s, %s %s%s", adapter.describe(), how, whose, _not_changed(adapter, transformer))
    # Before blocks are compiled or streamed: it changes what class a layer of theirs is of.
    fuse_gelu(transformer)
    if quantizer is not None:
        log.info("%s: %s", which, quantizer.describe(placement.asked))
    move_to_wait(transformer, blocks_of(transformer), placement, blocks_left_out)
    return transformer


def _not_changed(adapter: Adapter, model: WanTransformer3DModel) -> str:
    """What a log line adds of a LoRA that leaves alone what the model has beyond a text-to-video one; else nothing."""
    what, pieces = "sees pictures", PICTURE_LAYERS
    if isinstance(model, VACE_TRANSFORMER.kind):
        what, pieces = "sees the context", VACE_LAYERS
    elif model.config.image_dim is None:
        return ""
    if any(piece in name for piece in pieces for name in (*adapter.scaling, *adapter.differences)):
        return ""
    return f"; it changes nothing of what {what}, as one made for text to video"


def _load_text_encoder(component: Component, placement: Placement, dtype: torch.dtype) -> UMT5EncoderModel:
    encoder, quantizer = load_placed(component, component.model.encoder.block, placement, dtype)
    if quantizer is not None:
        log.info("text encoder: %s", quantizer.describe(placement.asked))
    return encoder
