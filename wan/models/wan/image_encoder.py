"""CLIP's picture tower, by which Wan2.1's transformers see the pictures that a video begins or ends with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from wan.checkpoints.component import Component, fitting
from wan.checkpoints.config_checks import check_layers, divides, fraction, numbers, sizes_of
from wan.checkpoints.file_errors import CheckpointError, read_json_object
from wan.checkpoints.locate import CONFIG
from wan.checkpoints.stacked import Stack, StackedFiles, join_parts
from wan.checkpoints.weights import WeightFiles
from wan.models.checkpoint import Checkpoint
from wan.models.wan.layout import IMAGE_ENCODER

Shapes = Mapping[str, tuple[int, ...]]
# The published program runs it in float16; it is small, and what it gives steers all layers.
DTYPE = torch.float32
# The published file has no word for heads; all of its kind are so wide.
HEAD = 80
EPS = 1e-5
# Of text, by which diffusers' cross-attention tells rows of pictures, before it, from rows of text.
TEXT_ROWS = 512
# Of what pictures were normalised by in training: a value a colour.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# What the published file has for comparing pictures with texts, and files of the hub for older libraries.
TEXT_TOWER, NOT_NEEDED = "textual.", ("log_scale", "visual.head")
NO_LONGER_READ = ("embeddings.position_ids", "visual_projection.weight")
# How older transformers, and files written by them, begin the names of its tensors.
PREFIX = "vision_model."
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
)
ACTIVATIONS = ("gelu", "quick_gelu")
# From transformers' names, without prefix, to published ones; what is stacked there, in brackets, see `stacks_of`.
RULES = (
    (r"^embeddings\.class_embedding$", "visual.cls_embedding[0]"),
    (r"^embeddings\.position_embedding\.weight$", "visual.pos_embedding[0]"),
    (r"^embeddings\.", "visual."),
    (r"^pre_layrnorm\.", "visual.pre_norm."),
    (r"^post_layernorm\.", "visual.post_norm."),
    (r"^encoder\.layers\.", "visual.transformer."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.(\w+)$", r".attn.to_qkv.\2[\1]"),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)


def image_encoder_component(checkpoint: Checkpoint) -> Component:
    """The picture tower; raises `CheckpointError` if it is not there whole, before data is read."""
    weights = IMAGE_ENCODER.find(checkpoint.folder, checkpoint.published)
    config = None if checkpoint.published else read_json_object(checkpoint.folder / IMAGE_ENCODER.name / CONFIG)
    return read_image_encoder(weights, config)


def read_image_encoder(weights: WeightFiles, config: Mapping[str, Any] | None) -> Component:
    """The tower of files, in diffusers' layout by its configuration; None: in the published layout, which has none."""
    weights.leave_out(is_not_needed)
    with fitting(CLIPVisionModel.__name__, weights):
        if config is None:
            own = config_of_tensors(weights.shapes)
        else:
            own = check_config(config, weights.shapes)
        with torch.device("meta"):
            model = CLIPVisionModel(own)
        if config is None:
            weights = StackedFiles(weights, stacks_of(own))
    if config is None:
        names = {published_name(name): name for name in model.state_dict()}
    else:
        prefix = PREFIX if any(name.startswith(PREFIX) for name in weights.shapes) else ""
        names = {prefix + name.removeprefix(PREFIX): name for name in model.state_dict()}
    return Component(model, weights, names)


def load_image_encoder(component: Component, device: torch.device | str) -> CLIPVisionModel:
    """The weights of `image_encoder_component`, in `DTYPE`, and what is not saved with them."""
    model = component.load(DTYPE, device)
    finish_image_encoder(model, device)
    return model


def finish_image_encoder(model: CLIPVisionModel, device: torch.device | str) -> None:
    """Give a tower that was made on the meta device the numbers of its positions, which are not saved."""
    # In older transformers the tower is a module of the model, in newer ones the model itself.
    embeddings = getattr(model, PREFIX.rstrip("."), model).embeddings
    embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions, device=device)[None], False)


def check_text_rows(count: int) -> None:
    """Raise `CheckpointError` for a transformer that sees pictures before so many rows of text, unless it is 512."""
    if count != TEXT_ROWS:
        raise CheckpointError(
            f"text_len is {count}, but must be {TEXT_ROWS} in a model that sees pictures before the text"
        )


def clip_pixels(picture: np.ndarray, size: int) -> Tensor:
    """(1, 3, size, size) float32, as the tower takes it, of a picture (height, width, 3) uint8 of any form.

    It is stretched to a square, by bicubic interpolation without antialiasing, as in the published program.
    """
    pixels = torch.from_numpy(np.array(picture, order="C")).movedim(2, 0)[None].float() / 255
    # There it is in [-1, 1] when it is interpolated, and is not clamped after that.
    pixels = F.interpolate(pixels * 2 - 1, (size, size), mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


@torch.no_grad()
def image_states(encoder: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Picture states (B, tokens, C) of pixels (B, 3, size, size), see `clip_pixels`, in the encoder's type.

    They come out of the last layer but one, and are not normalised.
    """
    pixels = pixels.to(encoder.device, encoder.dtype)
    return encoder(pixels, output_hidden_states=True).hidden_states[-2]


def is_not_needed(name: str) -> bool:
    """Whether a tensor of the files, by its name, is known to be of no use here."""
    return name.startswith(TEXT_TOWER) or name in NOT_NEEDED or name.removeprefix(PREFIX) in NO_LONGER_READ


def published_name(name: str) -> str:
    """The published name of a tensor of the model; of a part of a stacked one, that of `stacks_of`."""
    name = name.removeprefix(PREFIX)
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def stacks_of(config: CLIPVisionConfig) -> dict[str, Stack]:
    """The published tensors that the model has in parts, or without leading axes of one."""
    width, positions = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
    stacks = {
        "visual.cls_embedding": Stack((1, 1, width), ("visual.cls_embedding[0]",), (width,)),
        "visual.pos_embedding": Stack((1, positions, width), ("visual.pos_embedding[0]",), (positions, width)),
    }
    for layer in range(config.num_hidden_layers):
        for kind, columns in (("weight", (width,)), ("bias", ())):
            name = f"visual.transformer.{layer}.attn.to_qkv.{kind}"
            parts = tuple(f"{name}[{part}]" for part in "qkv")
            stacks[name] = Stack((3 * width, *columns), parts, (width, *columns))
    return stacks


def published_tensors(component: Component) -> dict[str, Tensor]:
    """The tower's tensors as the published file holds them, by their names in it."""
    tensors = {published_name(name): tensor for name, tensor in component.tensors()}
    return join_parts(tensors, stacks_of(component.model.config))


def published_shapes(model: CLIPVisionModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the tower's tensors as the published file holds them, by their names in it."""
    stacks = stacks_of(model.config)
    parts = {part for stack in stacks.values() for part in stack.parts}
    named = {published_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    own = {name: shape for name, shape in named.items() if name not in parts}
    return own | {name: stack.whole for name, stack in stacks.items()}


def config_of_tensors(shapes: Shapes) -> CLIPVisionConfig:
    """The configuration of published tensors of these shapes; raises `ValueError` or `LookupError` for others."""
    width, colours, patch = shapes["visual.patch_embedding.weight"][:3]
    # One more than there are patches.
    positions = shapes["visual.pos_embedding"][1]
    rows = math.isqrt(positions - 1)
    if rows**2 != positions - 1:
        raise ValueError(f"it has {positions} positions, but must have one and those of a square picture's patches")
    divides("the width of a head", HEAD, "its width", width)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["visual.transformer.0.mlp.0.weight"][0],
        num_hidden_layers=numbers(shapes, "visual.transformer."),
        num_attention_heads=width // HEAD,
        num_channels=colours,
        image_size=rows * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=EPS,
    )


def check_config(config: Mapping[str, Any], shapes: Shapes) -> CLIPVisionConfig:
    """What a configuration says of the tower; raises `ValueError` if it is not of tensors of these shapes."""
    if config.get("model_type", CLIPVisionConfig.model_type) != CLIPVisionConfig.model_type:
        raise ValueError(f"model_type is {config['model_type']!r}, but must be {CLIPVisionConfig.model_type!r}")
    sizes_of(config, SIZES)
    if "layer_norm_eps" in config:
        fraction("layer_norm_eps", config["layer_norm_eps"])
    keys = (*SIZES, "hidden_act", "layer_norm_eps")
    own = CLIPVisionConfig(**{key: config[key] for key in keys if key in config})
    if own.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {own.hidden_act!r}, but must be one of {', '.join(ACTIVATIONS)}")
    divides("num_attention_heads", own.num_attention_heads, "hidden_size", own.hidden_size)
    divides("patch_size", own.patch_size, "image_size", own.image_size)
    bare = [name.removeprefix(PREFIX) for name in shapes]
    check_layers("num_hidden_layers", own.num_hidden_layers, numbers(bare, "encoder.layers."))
    return own
