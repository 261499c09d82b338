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
from wan.memory.estimates import FLOAT32_BYTES, Decoding, Workload
from wan.memory.placement import has_room_for
from wan.memory.planning import Weighed
from wan.memory.weigh import weights_of
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.processor import blocks_of
from wan.models.wan.vae import decoding_of, encoding_of
from wan.quantize.float8 import FLOAT8
from wan.quantize.gguf import GGUF

MODULATIONS = 6
# VACE's source, its mask, and what of it is kept and what made, while the latter two are encoded one after the other.
VACE_VIDEOS = 4


def weigh_run(checkpoint: Checkpoint, several: Sequence[Settings], compiled: bool | None = None) -> Weighed:
    """What the models and videos of a run take, which differ in no setting of models; see `Family.memory`."""
    settings, dtype = several[0], getattr(torch, several[0].dtype or "float32")
    transformer = components.transformer_component(checkpoint, settings.transformer)
    is_gguf = check_packed(transformer, fp8=settings.fp8)
    text, vae = components.text_encoder_component(checkpoint, dtype), components.vae_component(checkpoint)
    vae_dtype = vae_dtype_of(settings.vae_dtype and getattr(torch, settings.vae_dtype), dtype)
    models = transformer.model, text.model, vae.model
    return Weighed(
        weights_of(transformer, blocks_of(transformer.model), dtype, settings.lora),
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
    own, tokens = transformer.config, math.prod(settings.video.token_grid)
    encoding, given = encoding_for(transformer, vae, settings)
    return Workload(
        tokens=tokens,
        dim=own.num_attention_heads * own.attention_head_dim,
        ffn_dim=own.ffn_dim,
        heads=own.num_attention_heads,
        text_dim=text.config.d_model,
        decoding=decoding_of(settings.video.size, settings.video.frame_num, vae_dtype, vae.config),
        itemsize=dtype.itemsize,
        # Plans are for GPUs, on which None compiles.
        compiled=compiled is not False,
        mask_layers=len(blocks_of(transformer)) if settings.attention.mask_refresh > 1 else 0,
        cached=0 if settings.cache is None else COPIES[settings.cache.kind],
        beside=hint_bytes(transformer, tokens, dtype) + modulation_bytes(transformer, vae, settings, tokens, dtype),
        encoding=encoding,
        given=given,
    )


def hint_bytes(transformer: nn.Module, tokens: int, dtype: torch.dtype) -> int:
    """What VACE's own blocks leave for the others: a hint of each, and their states, as they were given and are."""
    own = transformer.config
    hints = len(own.get("vace_layers", ()))
    return (hints + 2) * tokens * own.num_attention_heads * own.attention_head_dim * dtype.itemsize if hints else 0


def modulation_bytes(
    transformer: nn.Module, vae: nn.Module, settings: Settings, tokens: int, dtype: torch.dtype
) -> int:
    """What modulations take where each token has a timestep of its own: Wan2.2's 5B with a picture."""
    if settings.image is None or not has_own_timesteps(vae):
        return 0
    own = transformer.config
    each = tokens * own.num_attention_heads * own.attention_head_dim
    # Six in the run's type, of all blocks, and in float32 those of the one that runs; and what they are made of.
    return each * (MODULATIONS * (dtype.itemsize + FLOAT32_BYTES) + dtype.itemsize)


def has_own_timesteps(vae: nn.Module) -> bool:
    """Whether a picture is the first latent frame as it is, at a timestep of its own: with Wan2.2's VAE."""
    return vae.config.is_residual


def encoding_for(transformer: nn.Module, vae: nn.Module, settings: Settings) -> tuple[Decoding | None, int]:
    """What the VAE encodes of what a run is given, and bytes of what else of it lies beside."""
    own, video = transformer.config, settings.video
    width, height = video.size
    given = 0
    if own.get("vace_layers"):
        frames = video.frame_num
        given = VACE_VIDEOS * frames * width * height * 3 * FLOAT32_BYTES
    elif own.in_channels != own.out_channels:
        # All frames, of which those that are not given are grey.
        frames = video.frame_num
    elif settings.image is not None and has_own_timesteps(vae):
        frames = 1
    else:
        return None, 0
    return encoding_of(video.size, frames, torch.float32, vae.config), given


def has_room_for_both(transformer: nn.Module, latents: Tensor) -> bool:
    """Whether both guidance branches are so small beside the GPU that one batch of two fills it better."""
    config = transformer.config
    # latents (B, C, T, h, w): places of one channel, in patches, for two branches.
    tokens = 2 * latents[:, 0].numel() // math.prod(config.patch_size)
    width = config.num_attention_heads * config.attention_head_dim
    return has_room_for(tokens, width, config.ffn_dim, transformer.dtype.itemsize, latents.device)
