"""The published layout: what it calls a model's tensors, and how the model is read off these and its one JSON."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from wan.checkpoints.config_checks import check_layers, fraction, numbers, positive
from wan.models.wan import names, vae_names

Shapes = Mapping[str, tuple[int, ...]]
# What says the same in the JSON and in diffusers' configuration.
SAME_SIZE = {
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
}
CONFIG_KEYS = {*SAME_SIZE, "model_type", "dim", "text_len", "eps", "sparse_algo"}


def tensor_name(model: nn.Module) -> Callable[[str], str]:
    """From the name of a tensor in a model of diffusers or transformers to its published one."""
    if isinstance(model, AutoencoderKLWan):
        return vae_names.published_name(model)
    rules = names.TRANSFORMER if isinstance(model, WanTransformer3DModel) else names.TEXT_ENCODER
    return functools.partial(names.published, rules=rules)


def transformer(config: Mapping[str, Any], shapes: Shapes) -> WanTransformer3DModel:
    """The transformer of a JSON and tensors of these shapes, on the meta device."""
    sizes = {own: positive(key, config.get(key)) for key, own in SAME_SIZE.items()}
    width = positive("dim", config.get("dim"))
    if width % sizes["num_attention_heads"]:
        raise ValueError(f"dim {width} is not {sizes['num_attention_heads']} heads (num_heads) of one size")
    fraction("eps", config.get("eps"))
    check_layers("num_layers", sizes["num_layers"], numbers(shapes, "blocks."))
    with torch.device("meta"):
        return WanTransformer3DModel(
            # A convolution (dim, channels, *patch), as the JSON has no word for the patch.
            patch_size=tuple(shapes["patch_embedding.weight"][2:]),
            attention_head_dim=width // sizes["num_attention_heads"],
            text_dim=shapes["text_embedding.0.weight"][1],
            eps=float(config["eps"]),
            **sizes,
        )


def transformer_config(model: WanTransformer3DModel, text_length: int) -> dict[str, Any]:
    """The JSON that `transformer` reads back.

    text_length: rows of text states that the model sees
    """
    own = model.config
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": own.num_attention_heads * own.attention_head_dim,
        **{key: own[name] for key, name in SAME_SIZE.items()},
        "text_len": text_length,
        "eps": own.eps,
    }


def text_encoder(shapes: Shapes) -> UMT5EncoderModel:
    """The text encoder of tensors of these shapes, on the meta device."""
    vocabulary, width = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes["blocks.0.attn.q.weight"][0] // heads,
        d_ff=shapes["blocks.0.ffn.fc1.weight"][0],
        num_layers=numbers(shapes, "blocks."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    with torch.device("meta"):
        return UMT5EncoderModel(config)
