"""What Wan's models and a video of them take of memory, told to the planner before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wan.checkpoints.gguf_file import check_packed
from wan.config.cache_settings import COPIES
from wan.config.settings import Settings
from wan.memory.decoding import vae_dtype_of
from wan.memory.estimates import Workload
from wan.memory.placement import has_room_for
from wan.memory.planning import Weighed
from wan.memory.weigh import weights_of
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.vae import decoding_of
from wan.quantize.float8 import FLOAT8
from wan.quantize.gguf import GGUF


def weigh_run(checkpoint: Checkpoint, several: Sequence[Settings], compiled: bool | None = None) -> Weighed:
    """What the models and videos of a run take, which differ in no setting of models; see `Family.memory`."""
    settings, dtype = several[0], getattr(torch, several[0].dtype or "float32")
    transformer = components.transformer_component(checkpoint, settings.transformer)
    is_gguf = check_packed(transformer, fp8=settings.fp8)
    text, vae = components.text_encoder_component(checkpoint, dtype), components.vae_component(checkpoint)
    vae_dtype = vae_dtype_of(settings.vae_dtype and getattr(torch, settings.vae_dtype), dtype)
    models = transformer.model, text.model, vae.model
    return Weighed(
        weights_of(transformer, transformer.model.blocks, dtype, settings.lora),
        weights_of(text, text.model.encoder.block, dtype),
        # It is read in float32, its decoder converted after that.
        vae.bytes(torch.float32),
        [workload_of(*models, one, dtype, vae_dtype, compiled) for one in several],
        GGUF.key if is_gguf else FLOAT8.key if settings.fp8 else None,
    )


def workload_of(
    transformer: nn.Module,
    text: nn.Module,
    vae: nn.Module,
    settings: Settings,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    compiled: bool | None,
) -> Workload:
    """A video and the widths of the models that make it."""
    own = transformer.config
    return Workload(
        tokens=math.prod(settings.video.token_grid),
        dim=own.num_attention_heads * own.attention_head_dim,
        ffn_dim=own.ffn_dim,
        heads=own.num_attention_heads,
        text_dim=text.config.d_model,
        decoding=decoding_of(settings.video.size, settings.video.frame_num, vae_dtype, vae.config.base_dim),
        itemsize=dtype.itemsize,
        # Plans are for GPUs, on which None compiles.
        compiled=compiled is not False,
        mask_layers=own.num_layers if settings.attention.mask_refresh > 1 else 0,
        cached=0 if settings.cache is None else COPIES[settings.cache.kind],
    )


def has_room_for_both(transformer: nn.Module, latents: Tensor) -> bool:
    """Whether both guidance branches are so small beside the GPU that one batch of two fills it better."""
    config = transformer.config
    # latents (B, C, T, h, w): places of one channel, in patches, for two branches.
    tokens = 2 * latents[:, 0].numel() // math.prod(config.patch_size)
    width = config.num_attention_heads * config.attention_head_dim
    return has_room_for(tokens, width, config.ffn_dim, transformer.dtype.itemsize, latents.device)
