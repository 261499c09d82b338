"""What Wan's models and a video of them take of memory, told to the planner before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nabla import InputError
from wan.checkpoints.gguf_file import check_packed
from wan.config.cache_settings import COPIES
from wan.config.settings import Settings, VideoSettings
from wan.memory.decoding import vae_dtype_of
from wan.memory.estimates import FLOAT32_BYTES, Decoding, Workload
from wan.memory.placement import has_room_for
from wan.memory.planning import Weighed
from wan.memory.weigh import weights_of
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.image_encoder import image_encoder_component
from wan.models.wan.kinds import kind_of
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
    files, kind = settings.model.transformer_files, kind_of(checkpoint.layout)
    experts = {
        name: components.transformer_component(checkpoint, files.get(name), name) for name in kind.experts or (None,)
    }
    packed = {check_packed(one, fp8=settings.fp8) for one in experts.values()}
    if len(packed) > 1:
        raise InputError("--memory plans for experts stored alike; give GGUF files of both, or of none")
    weights = [
        weights_of(one, blocks_of(one.model), dtype, settings.model.lora_of(name)) for name, one in experts.items()
    ]
    transformer, is_gguf = next(iter(experts.values())), packed == {True}
    text, vae = components.text_encoder_component(checkpoint, dtype), components.vae_component(checkpoint)
    vae_dtype = vae_dtype_of(settings.vae_dtype and getattr(torch, settings.vae_dtype), dtype)
    models = transformer.model, text.model, vae.model
    return Weighed(
        max(weights, key=lambda one: one.bytes(GGUF.key if is_gguf else None)),
        weights_of(text, text.model.encoder.block, dtype),
        # It is read in float32, its decoder converted after that.
        vae.bytes(torch.float32),
        [workload_of(*models, one, dtype, vae_dtype, compiled) for one in several],
        GGUF.key if is_gguf else FLOAT8.key if settings.fp8 else None,
        len(experts),
        image_encoder_component(checkpoint).bytes(torch.float32) if kind.sees_pictures else 0,
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
    """What a run's settings ask for, and the widths of the models that do it."""
    has_picture, references = settings.image is not None, len(settings.src_ref_images)
    return replace(
        video_workload(transformer, text, vae, settings.video, has_picture, dtype, vae_dtype, references),
        # Plans are for GPUs, on which None compiles.
        compiled=compiled is not False,
        mask_layers=len(blocks_of(transformer)) if settings.attention.mask_refresh > 1 else 0,
        cached=0 if settings.cache is None else COPIES[settings.cache.kind],
    )


def video_workload(
    transformer: nn.Module,
    text: nn.Module,
    vae: nn.Module,
    video: VideoSettings,
    has_picture: bool,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    references: int = 0,
) -> Workload:
    """A video, of a picture or not, and the widths of the models that make it, their blocks compiled.

    references: how many pictures stand in front of it
    """
    frames, rows, columns = video.token_grid
    own, tokens = transformer.config, (frames + references) * rows * columns
    # A picture is the first latent frame as it is, whose tokens have a timestep of their own, with Wan2.2's VAE.
    is_frame = has_picture and vae.config.is_residual
    modulations = modulation_bytes(transformer, tokens, dtype) if is_frame else 0
    encoding, given = encoding_for(transformer, vae, video, is_frame)
    return Workload(
        tokens=tokens,
        dim=own.num_attention_heads * own.attention_head_dim,
        ffn_dim=own.ffn_dim,
        heads=own.num_attention_heads,
        text_dim=text.config.d_model,
        decoding=decoding_of(video.size, video.frame_num, vae_dtype, vae.config),
        itemsize=dtype.itemsize,
        beside=hint_bytes(transformer, tokens, dtype) + modulations,
        encoding=encoding,
        given=given,
    )


def hint_bytes(transformer: nn.Module, tokens: int, dtype: torch.dtype) -> int:
    """What VACE's own blocks leave for the others: a hint of each, and their states, as they were given and are."""
    own = transformer.config
    hints = len(own.get("vace_layers", ()))
    return (hints + 2) * tokens * own.num_attention_heads * own.attention_head_dim * dtype.itemsize if hints else 0


def modulation_bytes(transformer: nn.Module, tokens: int, dtype: torch.dtype) -> int:
    """What modulations take where each token has a timestep of its own."""
    own = transformer.config
    each = tokens * own.num_attention_heads * own.attention_head_dim
    # Six in the run's type, of all blocks, and in float32 those of the one that runs; and what they are made of.
    return each * (MODULATIONS * (dtype.itemsize + FLOAT32_BYTES) + dtype.itemsize)


def encoding_for(
    transformer: nn.Module, vae: nn.Module, video: VideoSettings, is_frame: bool
) -> tuple[Decoding | None, int]:
    """What the VAE encodes of what is given for a video, and bytes of what else of that lies beside.

    is_frame: whether a picture is given that is the first frame
    """
    own, frames, given = transformer.config, video.frame_num, 0
    if own.get("vace_layers"):
        given = VACE_VIDEOS * frames * math.prod(video.size) * 3 * FLOAT32_BYTES
    elif is_frame:
        frames = 1
    elif own.in_channels == own.out_channels:
        return None, 0
    # Else all frames, of which those that are not given are grey.
    return encoding_of(video.size, frames, torch.float32, vae.config), given


def has_room_for_both(transformer: nn.Module, latents: Tensor) -> bool:
    """Whether both guidance branches are so small beside the GPU that one batch of two fills it better."""
    config = transformer.config
    # latents (B, C, T, h, w): places of one channel, in patches, for two branches.
    tokens = 2 * latents[:, 0].numel() // math.prod(config.patch_size)
    width = config.num_attention_heads * config.attention_head_dim
    return has_room_for(tokens, width, config.ffn_dim, transformer.dtype.itemsize, latents.device)
