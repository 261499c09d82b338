"""What Kandinsky-5's models and a video of them take of memory, told to the planner before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wan.config.cache_settings import COPIES
from wan.config.settings import Settings, writers_of
from wan.memory.decoding import vae_dtype_of
from wan.memory.estimates import Weights, Workload
from wan.memory.placement import has_room_for
from wan.memory.planning import Weighed
from wan.memory.weigh import weigh, weights_of
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky import components
from wan.models.kandinsky.expand import language_model_of
from wan.models.kandinsky.picture import HD_AREA
from wan.models.kandinsky.processor import FLOAT32_MODULES, TRANSFORMER, grid_of, rotation_bytes
from wan.models.kandinsky.text import CLIP_DTYPE
from wan.models.kandinsky.vae import decoding_of
from wan.quantize.float8 import FLOAT8

# Tokens of an instruction with a long prompt and of what is written, and of the largest picture that is shown: a token
# stands for 28 by 28 pixels, beside which the wide states of its four patches in the vision tower are small.
TEXT_ROWS = 1024
PICTURE_ROWS = HD_AREA // 28**2


def weigh_run(checkpoint: Checkpoint, several: Sequence[Settings], compiled: bool | None = None) -> Weighed:
    """What the models and videos of a run take, which differ in no setting of models; see `Family.memory`."""
    settings, dtype = several[0], getattr(torch, several[0].dtype or "float32")
    transformer = components.transformer_component(checkpoint, settings.model.transformer_files.get(None))
    clip, (writes, sees) = components.text_encoder_2_component(checkpoint), writers_of(several)
    qwen = components.writer_component(checkpoint, sees) if writes else components.text_encoder_component(checkpoint)
    language = language_model_of(qwen.model)
    vae = components.vae_component(checkpoint)
    vae_dtype = vae_dtype_of(settings.vae_dtype and getattr(torch, settings.vae_dtype), dtype)
    text = weights_of(qwen, language.layers, dtype)
    models, visual = (transformer.model, language, vae.model), TRANSFORMER.blocks_of(transformer.model)
    return Weighed(
        with_text_blocks(weights_of(transformer, visual, dtype, settings.lora), transformer.model, dtype),
        # CLIP lies beside the language model, whole.
        replace(text, rest=text.rest + clip.bytes(CLIP_DTYPE)),
        # It is read in float32, its decoder converted after that.
        vae.bytes(torch.float32),
        [workload_of(*models, one, dtype, vae_dtype, compiled) for one in several],
        FLOAT8.key if settings.fp8 else None,
    )


def with_text_blocks(weights: Weights, transformer: nn.Module, dtype: torch.dtype) -> Weights:
    """What a transformer weighs by its visual blocks, with those of its text counted as so many more, than which they
    are smaller: they wait and pass like them.
    """
    inside = weigh(transformer, transformer.text_transformer_blocks, dtype, FLOAT32_MODULES)
    return replace(
        weights, blocks=weights.blocks + inside.blocks, rest=weights.rest - inside.blocks * inside.block(None)
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
    own, width = transformer.config, vae.config.block_out_channels[0]
    tokens = math.prod(settings.video.token_grid)
    return Workload(
        tokens=tokens,
        dim=own.model_dim,
        ffn_dim=own.ff_dim,
        heads=TRANSFORMER.heads(transformer),
        text_dim=text.config.hidden_size,
        decoding=decoding_of(settings.video.size, settings.video.frame_num, vae_dtype, width),
        itemsize=dtype.itemsize,
        # Plans are for GPUs, on which None compiles.
        compiled=compiled is not False,
        mask_layers=own.num_visual_blocks if settings.attention.mask_refresh > 1 else 0,
        cached=0 if settings.cache is None else COPIES[settings.cache.kind],
        writing=writing_bytes(text.config, dtype.itemsize, settings) if settings.writes_prompt else 0,
        beside=rotation_bytes(tokens, TRANSFORMER.head_size(transformer)),
    )


def writing_bytes(config: Any, itemsize: int, settings: Settings) -> int:
    """What the language model takes to write a prompt out, beside weights: of all tokens keys and values of each layer
    and the wide states of one, and scores of the vocabulary.
    """
    rows = TEXT_ROWS + (0 if settings.image is None else PICTURE_ROWS)
    head = config.hidden_size // config.num_attention_heads
    kept = config.num_hidden_layers * 2 * config.num_key_value_heads * head
    wide = 3 * config.intermediate_size + 8 * config.hidden_size
    # Scores of the last token, in float32: as they are, penalised, and sorted out.
    return rows * (kept + wide) * itemsize + 4 * config.vocab_size * 4


def has_room_for_both(transformer: nn.Module, latents: Tensor) -> bool:
    """Whether both guidance branches are so small beside the GPU that one batch of two fills it better."""
    config = transformer.config
    tokens = 2 * len(latents) * math.prod(grid_of(transformer, latents.shape[2:]))
    return has_room_for(tokens, config.model_dim, config.ff_dim, transformer.dtype.itemsize, latents.device)
