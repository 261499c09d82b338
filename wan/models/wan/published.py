"""The published layout: what it calls a model's tensors, and how the model is read off these and its one JSON."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from nabla.checks import is_count
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
CONFIG_KEYS = {*SAME_SIZE, "model_type", "dim", "text_len", "eps", "vace_layers", "vace_in_dim", "sparse_algo"}
Transformer = WanTransformer3DModel | WanVACETransformer3DModel


def tensor_name(model: nn.Module) -> Callable[[str], str]:
    """From the name of a tensor in a model of diffusers or transformers to its published one."""
    if isinstance(model, AutoencoderKLWan):
        return vae_names.published_name(model)
    rules = names.TRANSFORMER if isinstance(model, Transformer) else names.TEXT_ENCODER
    return functools.partial(names.published, rules=rules)


def transformer(config: Mapping[str, Any], shapes: Shapes) -> Transformer:
    """The transformer of a JSON and tensors of these shapes, on the meta device.

    What it has beside text-to-video's is read off the tensors: the JSON does not tell it of every kind.
    """
    sizes = {own: positive(key, config.get(key)) for key, own in SAME_SIZE.items()}
    width = positive("dim", config.get("dim"))
    if width % sizes["num_attention_heads"]:
        raise ValueError(f"dim {width} is not {sizes['num_attention_heads']} heads (num_heads) of one size")
    fraction("eps", config.get("eps"))
    check_layers("num_layers", sizes["num_layers"], numbers(shapes, "blocks."))
    own: dict[str, Any] = {
        # A convolution (dim, channels, *patch), as the JSON has no word for the patch.
        "patch_size": tuple(shapes["patch_embedding.weight"][2:]),
        "attention_head_dim": width // sizes["num_attention_heads"],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "eps": float(config["eps"]),
        **sizes,
    }
    if "img_emb.proj.0.weight" in shapes:
        own |= {"image_dim": shapes["img_emb.proj.0.weight"][0], "added_kv_proj_dim": width}
    if "img_emb.emb_pos" in shapes:
        own["pos_embed_seq_len"] = shapes["img_emb.emb_pos"][1]
    if "vace_patch_embedding.weight" not in shapes:
        with torch.device("meta"):
            return WanTransformer3DModel(**own)
    layers, channels = check_vace(config.get("vace_layers"), sizes["num_layers"], shapes)
    if config.get("vace_in_dim", channels) != channels:
        raise ValueError(f"vace_in_dim is {config['vace_in_dim']!r}, but its files take {channels} channels")
    with torch.device("meta"):
        return WanVACETransformer3DModel(**own, vace_layers=layers, vace_in_channels=channels)


def check_vace(said: object, count: int, shapes: Shapes) -> tuple[list[int], int]:
    """The layers behind which hints are added, and the channels that these are made of; raises `ValueError`.

    count: of the model's layers
    """
    there = numbers(shapes, "vace_blocks.")
    layers = said if isinstance(said, (list, tuple)) else []
    if not layers or not all(is_count(n) and n < count for n in layers) or list(layers) != sorted(set(layers)):
        raise ValueError(f"vace_layers is {said!r}, but must be ascending numbers of its {count} layers")
    if layers[0] != 0:
        raise ValueError(f"vace_layers is {said!r}, but must begin with 0")
    check_layers("the count of vace_layers", len(layers), there)
    return list(layers), shapes["vace_patch_embedding.weight"][1]


def transformer_config(model: Transformer, text_length: int, model_type: str = "t2v") -> dict[str, Any]:
    """The JSON that `transformer` reads back.

    text_length: rows of text states that the model sees
    model_type: as the published program has it, which goes by that
    """
    own = model.config
    vace = {}
    if isinstance(model, WanVACETransformer3DModel):
        vace = {"vace_layers": list(own.vace_layers), "vace_in_dim": own.vace_in_channels}
    return {
        "_class_name": "VaceWanModel" if vace else "WanModel",
        "model_type": model_type,
        "dim": own.num_attention_heads * own.attention_head_dim,
        **{key: own[name] for key, name in SAME_SIZE.items()},
        "text_len": text_length,
        "eps": own.eps,
        **vace,
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
