"""A transformer of Wan2.1 with the weights that training begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from nabla import InputError
from nabla.checks import is_count, is_number
from wan.models.training import TEXT_LENGTH
from wan.models.wan import components
from wan.models.wan.geometry import GEOMETRY

# As `init_weights` of the published program has it (wan/modules/model.py).
EMBEDDING_STD = 0.02
# diffusers' defaults for them are those of the 14B.
SIZES = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "text_dim")
OTHER_SIZES = ("freq_dim", "in_channels", "out_channels", "rope_max_seq_len")
CHANNELS = 16
# Sinusoids come in pairs, and each of the three axes of a video has one at least.
LEAST_EVEN = {"attention_head_dim": 6, "freq_dim": 2}
# Of what else diffusers' class takes, all that makes Wan2.1 from text.
FIXED = {"patch_size": GEOMETRY.patch, "qk_norm": "rms_norm_across_heads"}
FIXED |= dict.fromkeys(("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"))


def new_transformer(sizes: dict[str, Any], device: torch.device) -> WanTransformer3DModel:
    """A transformer with the weights that Wan2.1's training begins with, drawn from torch's global generator.

    sizes: keys of diffusers' `WanTransformer3DModel`, and `text_len`, how many rows of text states it is to see
    Raises `InputError` for others, for sizes that make no transformer, and if one of `SIZES` is missing.
    """
    _check_sizes(sizes)
    try:
        transformer = WanTransformer3DModel(**{key: value for key, value in sizes.items() if key != TEXT_LENGTH})
    except (TypeError, ValueError) as error:
        raise InputError(f"transformer: {error}; its keys are those of diffusers' WanTransformer3DModel") from None
    # Drawn on the CPU, so that a seed gives the same weights on every device. Xavier for linear layers, normal ones for
    # the embeddings' and zeros for the last layer, which so predicts 0 at first, as the published program begins.
    for module in transformer.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            # A convolution here is the linear layer of a patch.
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedder = transformer.condition_embedder
    for embedding in (embedder.text_embedder, embedder.time_embedder):
        for layer in (embedding.linear_1, embedding.linear_2):
            nn.init.normal_(layer.weight, std=EMBEDDING_STD)
    nn.init.zeros_(transformer.proj_out.weight)
    transformer.to(device)
    components.finish_transformer(transformer, device)
    return transformer


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    if missing := [name for name in SIZES if name not in sizes]:
        raise InputError(f"transformer: {missing[0]} is missing; give {', '.join(SIZES)}")
    for name in (*SIZES, *OTHER_SIZES):
        if name in sizes and (not is_count(sizes[name]) or sizes[name] == 0):
            raise InputError(f"transformer: {name} {sizes[name]!r} is not a positive integer")
    for name, least in LEAST_EVEN.items():
        if name in sizes and (sizes[name] % 2 or sizes[name] < least):
            raise InputError(f"transformer: {name} {sizes[name]} is not an even number of at least {least}")
    channels = [sizes.get(name, CHANNELS) for name in ("in_channels", "out_channels")]
    if channels[0] != channels[1]:
        raise InputError(
            f"transformer: out_channels {channels[1]} must be in_channels, {channels[0]}; {CHANNELS} is usual"
        )
    if "eps" in sizes and not (is_number(sizes["eps"]) and sizes["eps"] > 0):
        raise InputError(f"transformer: eps {sizes['eps']!r} is not a positive number; 1e-6 is usual")
    for name, only in FIXED.items():
        given = sizes.get(name, only)
        if (tuple(given) if isinstance(given, list) else given) != only:
            raise InputError(f"transformer: {name} {given!r} must be {only}, as in Wan2.1; leave it out")
