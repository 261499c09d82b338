"""What a configuration may say of a model, held against the tensors of its files before anything is built of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import UMT5Config

from nabla.checks import is_count
from wan.checkpoints.config_checks import check_layers, each, fraction, numbers, positive
from wan.models.wan.layout import MAX_POSITIONS
from wan.models.wan.published import check_vace

Shapes = Mapping[str, tuple[int, ...]]
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
# diffusers' default.
VACE_LAYERS = [0, 5, 10, 15, 20, 25, 30, 35]
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
        each("patch_size", config["patch_size"], is_count, 3, "positive integers")
    if "eps" in config:
        fraction("eps", config["eps"])
    _boolean(config, "cross_attn_norm")
    if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        raise ValueError(f"qk_norm is {config['qk_norm']!r}, but must be 'rms_norm_across_heads'")
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if config.get(key) is not None:
            positive(key, config[key])
    if (config.get("image_dim") is None) != (config.get("added_kv_proj_dim") is None):
        raise ValueError("image_dim and added_kv_proj_dim must both be null or neither")
    count = config.get("num_layers", 40)
    check_layers("num_layers", count, numbers(shapes, "blocks."))
    if "vace_in_channels" in config:
        positive("vace_in_channels", config["vace_in_channels"])
    if "vace_layers" in config or "vace_patch_embedding.weight" in shapes:
        check_vace(config.get("vace_layers", VACE_LAYERS), count, shapes)


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
