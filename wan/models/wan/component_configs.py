"""What a configuration may say of a model, held against the tensors of its files before anything is built of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import UMT5Config

from nabla.config import is_count, is_number
from wan.checkpoints.config_checks import MAX_LAYERS, MAX_WIDTH, check_layers, fraction, numbers, positive
from wan.models.wan.layout import MAX_POSITIONS

Shapes = Mapping[str, tuple[int, ...]]
# Several times what the VAE has.
MAX_STAGES = 8

FIRST_RESIDUAL = re.compile(r"encoder\.down_blocks\.\d+\.conv1\.weight")
TRANSFORMER_SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
)
VAE_SIZES = ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels")
TEXT_SIZES = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
# Of a text encoder's configuration, what its encoder computes with; the rest is of decoders, labels and training.
TEXT_KEYS = (*TEXT_SIZES, "dropout_rate", "layer_norm_epsilon", "feed_forward_proj")
# What must be as it follows from these, where it is said.
TEXT_FOLLOWS = ("dense_act_fn", "is_gated_act")


def check_transformer(config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise `ValueError` for a configuration of `WanTransformer3DModel` that is not of tensors of these shapes."""
    # What a configuration leaves out has diffusers' default, here and below.
    for key in TRANSFORMER_SIZES:
        if key in config:
            positive(key, config[key])
    if "rope_max_seq_len" in config:
        positive("rope_max_seq_len", config["rope_max_seq_len"], MAX_POSITIONS)
    if "patch_size" in config:
        _each("patch_size", config["patch_size"], is_count, 3, "positive integers")
    if "eps" in config:
        fraction("eps", config["eps"])
    _boolean(config, "cross_attn_norm")
    if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        raise ValueError(f"qk_norm is {config['qk_norm']!r}, but must be 'rms_norm_across_heads'")
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if config.get(key) is not None:
            raise ValueError(f"{key} is {config[key]!r}, which text-to-video does not have; it must be null")
    check_layers("num_layers", config.get("num_layers", 40), numbers(shapes, "blocks."))


def check_vae(config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise `ValueError` for a configuration of `AutoencoderKLWan` that is not of tensors of these shapes."""
    for key in VAE_SIZES:
        if key in config:
            positive(key, config[key], MAX_LAYERS if key == "num_res_blocks" else MAX_WIDTH)
    if config.get("decoder_base_dim") is not None:
        positive("decoder_base_dim", config["decoder_base_dim"])
    stages = config.get("dim_mult", [1, 2, 4, 4])
    _each("dim_mult", stages, lambda value: is_count(value) and 0 < value <= MAX_WIDTH, None, "positive integers")
    _each("attn_scales", config.get("attn_scales", []), is_number, None, "numbers")
    halves = config.get("temperal_downsample", [False, True, True])
    _each("temperal_downsample", halves, lambda value: isinstance(value, bool), len(stages) - 1, "booleans")
    if not is_number(config.get("dropout", 0.0)) or not 0 <= config.get("dropout", 0.0) < 1:
        raise ValueError(f"dropout is {config['dropout']!r}, but must be a number of at least 0 and below 1")
    _boolean(config, "is_residual")
    # Wan2.1's encoder lists its blocks one after the other, and only residual ones have a `conv1`; with `is_residual`
    # they are nested in stages, and not counted.
    there = sum(1 for name in shapes if FIRST_RESIDUAL.fullmatch(name))
    said = len(stages) * config.get("num_res_blocks", 2)
    if said != there and not config.get("is_residual", False):
        raise ValueError(f"dim_mult and num_res_blocks say {said} residual blocks of the encoder, its files {there}")


def text_config(config: Mapping[str, Any], shapes: Shapes) -> UMT5Config:
    """The part of a configuration that an encoder computes with; raises `ValueError` if it is not of these shapes."""
    for key in TEXT_SIZES:
        if key in config:
            positive(key, config[key], 2**31 if key == "relative_attention_max_distance" else 2**24)
    for key in ("dropout_rate", "layer_norm_epsilon"):
        if key in config:
            fraction(key, config[key])
    kind = config.get("feed_forward_proj", "gated-gelu")
    if not isinstance(kind, str):
        raise ValueError(f"feed_forward_proj is {kind!r}, but must be a text")
    # Of keys that are known alone: the class takes any, and acts on some.
    own = UMT5Config(**{key: config[key] for key in TEXT_KEYS if key in config})
    if config.get("is_decoder"):
        raise ValueError("is_decoder is set, and an encoder is needed")
    for key in TEXT_FOLLOWS:
        if key in config and config[key] != getattr(own, key):
            raise ValueError(f"{key} is {config[key]!r}, but feed_forward_proj means {getattr(own, key)!r}")
    check_layers("num_layers", own.num_layers, numbers(shapes, "encoder.block."))
    return own


def _boolean(config: Mapping[str, Any], key: str) -> None:
    if not isinstance(config.get(key, True), bool):
        raise ValueError(f"{key} is {config[key]!r}, but must be true or false")


def _each(key: str, value: object, fits: Callable[[Any], bool], length: int | None, what: str) -> None:
    if not isinstance(value, (list, tuple)) or not all(map(fits, value)) or len(value) > MAX_STAGES:
        raise ValueError(f"{key} is {value!r}, but must be a list of {what}")
    if length is not None and len(value) != length:
        raise ValueError(f"{key} is {value!r}, but must be {length} {what}")
