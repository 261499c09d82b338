"""The models of a checkpoint, each where it waits for its turn and as it runs best there."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from wan import memory, parts
from wan.checkpoint import Checkpoint
from wan.fast_vae import speed_up_decoder
from wan.fp8 import apply_fp8, check_fp8
from wan.fused_gelu import fuse_gelu

log = logging.getLogger("wan")


class Models(NamedTuple):
    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
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
) -> Models:
    """Load all models of a checkpoint; see `WanT2V.from_pretrained` for the arguments.

    Raises `CheckpointError`, before any weight is read, for a checkpoint that is incomplete or damaged.
    """
    if fp8:
        check_fp8(device, dtype)
    cpu = torch.device("cpu")
    vae_part, text_part = parts.vae_part(checkpoint), parts.text_encoder_part(checkpoint, dtype)
    transformer_part = parts.transformer_part(checkpoint)
    if offload is None:
        on_device = [transformer_part, vae_part] if t5_cpu else [transformer_part, vae_part, text_part]
        offload = memory.is_crowded(device, sum(part.bytes(dtype) for part in on_device))
    home = cpu if offload else device
    vae = vae_part.load(torch.float32, home)
    if vae_dtype is not None or device.type == "cuda":
        own = torch.float32 if dtype == torch.float32 else torch.float16
        speed_up_decoder(vae, vae_dtype or own)
    text_encoder = text_part.load(dtype, cpu if t5_cpu else home)
    transformer = parts.load_transformer(transformer_part, dtype, device if fp8 else home)
    fuse_gelu(transformer)
    if fp8:
        log.info("transformer: %s", apply_fp8(transformer).describe())
        transformer.to(home)
    tokenizer = parts.load_tokenizer(checkpoint, text_part.model.config.vocab_size)
    return Models(transformer, vae, text_encoder, tokenizer, offload)
