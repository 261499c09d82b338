"""The models as they are read off published tensors and configurations, on the meta device, and the names of tensors.

All raise `ValueError` for sizes that make no sense together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from nabla.checks import is_count
from wan.checkpoints.config_checks import check_layers, divides, fraction, numbers, positive, sizes_of
from wan.models.kandinsky.geometry import GEOMETRY
from wan.models.kandinsky.sizes import Shapes, transformer_config

QWEN_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
QWEN_KEYS = (*QWEN_SIZES, "hidden_act", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "pad_token_id")
# What generating text would need; numbers of tokens by default are those of another vocabulary.
NO_TOKENS = {"use_cache": False, "bos_token_id": None, "eos_token_id": None}
VISION_SIZES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
    "out_hidden_size",
)
VISION_KEYS = (*VISION_SIZES, "hidden_act", "fullatt_block_indexes")
VISION_PREFIXES = ("visual.", "model.visual.")
QWEN_TYPES = ("qwen2_5_vl", "qwen2_5_vl_text")
CLIP_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
CLIP_KEYS = (*CLIP_SIZES, "hidden_act", "layer_norm_eps", "projection_dim", "bos_token_id", "eos_token_id")
CLIP_TYPES = ("clip", "clip_text_model")
VAE_SIZES = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
VAE_KEYS = (
    *VAE_SIZES,
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "act_fn",
    "scaling_factor",
    "spatial_compression_ratio",
    "temporal_compression_ratio",
    "mid_block_add_attention",
)
VAE_BLOCKS = {"down_block_types": "HunyuanVideoDownBlock3D", "up_block_types": "HunyuanVideoUpBlock3D"}


def transformer(shapes: Shapes) -> Kandinsky5Transformer3DModel:
    """The transformer of tensors of these shapes; names are the same in the published layout and in diffusers'."""
    config = transformer_config(shapes)
    with torch.device("meta"):
        return Kandinsky5Transformer3DModel(**config)


def text_encoder(config: Mapping[str, Any], shapes: Shapes) -> Qwen2_5_VLTextModel:
    """The language model alone of a Qwen2.5-VL configuration, nested or flat as older ones are. shapes: by their own
    names, see `text_encoder_name`
    """
    made = _language_config(config, numbers(shapes, "layers."))
    with torch.device("meta"):
        return Qwen2_5_VLTextModel(made)


def writer(config: Mapping[str, Any], shapes: Shapes, sees: bool) -> Qwen2_5_VLForConditionalGeneration:
    """The same with the head that writes, and, if it `sees`, the vision tower. shapes: by their own names, see
    `writer_name`
    """
    language = _language_config(config, numbers(shapes, "model.language_model.layers."))
    # Without vision one of no layers, which is taken out again.
    vision = Qwen2_5_VLVisionConfig(depth=0, fullatt_block_indexes=[])
    if sees:
        vision = _vision_config(config, language.hidden_size, numbers(shapes, "model.visual.blocks."))
    tied = config.get("tie_word_embeddings", False) is True
    parts = {"text_config": language.to_dict(), "vision_config": vision.to_dict()}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**parts, tie_word_embeddings=tied))
    if not sees:
        model.model.visual = None
    return model


def _language_config(config: Mapping[str, Any], layers: int) -> Qwen2_5_VLTextConfig:
    own = _nested(config, QWEN_TYPES)
    sizes_of(own, QWEN_SIZES)
    if own.get("use_sliding_window"):
        raise ValueError("use_sliding_window is set, and the text encoder attends to all before a token")
    if "rms_norm_eps" in own:
        fraction("rms_norm_eps", own["rms_norm_eps"])
    made = Qwen2_5_VLTextConfig(**{key: own[key] for key in QWEN_KEYS if key in own}, **NO_TOKENS)
    divides("num_attention_heads", made.num_attention_heads, "hidden_size", made.hidden_size)
    divides("num_key_value_heads", made.num_key_value_heads, "num_attention_heads", made.num_attention_heads)
    half, sections = made.hidden_size // made.num_attention_heads // 2, made.rope_parameters.get("mrope_section")
    if not isinstance(sections, list) or len(sections) != 3 or sum(map(_count, sections)) != half:
        raise ValueError(f"mrope_section is {sections!r}, but must be three positive integers that sum up to {half}")
    check_layers("num_hidden_layers", made.num_hidden_layers, layers)
    return made


def _vision_config(config: Mapping[str, Any], width: int, layers: int) -> Qwen2_5_VLVisionConfig:
    """Of the vision tower, which gives states of `width` numbers."""
    own = config.get("vision_config")
    if not isinstance(own, Mapping):
        raise ValueError(f"vision_config is {own!r}, but must be a mapping")
    sizes_of(own, VISION_SIZES)
    whole = own.get("fullatt_block_indexes", [])
    if not isinstance(whole, list) or not all(is_count(number) for number in whole):
        raise ValueError(f"fullatt_block_indexes is {whole!r}, but must be a list of numbers of layers")
    made = Qwen2_5_VLVisionConfig(**{key: own[key] for key in VISION_KEYS if key in own})
    divides("num_heads", made.num_heads, "hidden_size", made.hidden_size)
    if made.out_hidden_size != width:
        raise ValueError(f"out_hidden_size is {made.out_hidden_size}, but the language model has {width}")
    check_layers("depth", made.depth, layers)
    return made


def text_encoder_2(config: Mapping[str, Any], shapes: Shapes) -> CLIPTextModel:
    """CLIP's text model of its own configuration or of a whole CLIP's. shapes: by their own names, see
    `text_encoder_2_name`
    """
    own = _nested(config, CLIP_TYPES)
    sizes_of(own, (*CLIP_SIZES, "projection_dim"))
    if "layer_norm_eps" in own:
        fraction("layer_norm_eps", own["layer_norm_eps"])
    default = CLIPTextConfig()
    heads, width = (own.get(key, getattr(default, key)) for key in ("num_attention_heads", "hidden_size"))
    divides("num_attention_heads", heads, "hidden_size", width)
    made = CLIPTextConfig(**{key: own[key] for key in CLIP_KEYS if key in own})
    check_layers("num_hidden_layers", made.num_hidden_layers, numbers(shapes, "encoder.layers."))
    with torch.device("meta"):
        return CLIPTextModel(made)


def vae(config: Mapping[str, Any], shapes: Shapes) -> AutoencoderKLHunyuanVideo:
    """The VAE of its configuration."""
    own = {key: config[key] for key in VAE_KEYS if key in config}
    sizes_of(own, VAE_SIZES)
    stages = own.get("block_out_channels", [])
    if not isinstance(stages, (list, tuple)) or not 0 < len(stages) <= 8:
        raise ValueError(f"block_out_channels is {stages!r}, but must be a list of positive integers")
    for width in stages:
        positive("block_out_channels", width)
        divides("norm_num_groups", own.get("norm_num_groups", 32), "block_out_channels", width)
    for key, kind in VAE_BLOCKS.items():
        if key in own and list(own[key]) != [kind] * len(stages):
            raise ValueError(f"{key} is {own[key]!r}, but must be {len(stages)} times {kind!r}")
    stride = GEOMETRY.vae_stride[0], GEOMETRY.vae_stride[1]
    said = own.get("temporal_compression_ratio", 4), own.get("spatial_compression_ratio", 8)
    if said != stride:
        raise ValueError(f"its temporal and spatial compression ratios are {said!r}, but must be {stride}")
    scale = own.get("scaling_factor", 0.476986)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < 1e6:
        raise ValueError(f"scaling_factor is {scale!r}, but must be a positive number")
    check_layers("block_out_channels", len(stages), numbers(shapes, "encoder.down_blocks."))
    with torch.device("meta"):
        return AutoencoderKLHunyuanVideo(**own)


def text_encoder_name(name: str) -> str | None:
    """What the language model alone calls a tensor of a Qwen2.5-VL file; None if it has no use for it."""
    if name == "lm_head.weight" or name.startswith(VISION_PREFIXES) or name.endswith(".inv_freq"):
        return None
    for prefix in ("model.language_model.", "language_model.model.", "language_model.", "model."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def writer_name(name: str, sees: bool, tied: bool) -> str | None:
    """What the language model with its head, and vision if it `sees`, calls a tensor of a Qwen2.5-VL file; None if it
    has no use for it. tied: the head is the table of tokens
    """
    if name == "lm_head.weight":
        return None if tied else name
    if name.startswith(VISION_PREFIXES):
        return f"model.visual.{name.partition('visual.')[2]}" if sees else None
    own = text_encoder_name(name)
    return None if own is None else f"model.language_model.{own}"


def text_encoder_2_name(name: str) -> str | None:
    """What CLIP's text model calls a tensor of a CLIP file; None if it has no use for it."""
    others = "vision_model.", "visual_projection.", "text_projection."
    if name.startswith(others) or name == "logit_scale" or name.endswith("position_ids"):
        return None
    return name.removeprefix("text_model.")


def renamed(shapes: Shapes, rename: Callable[[str], str | None]) -> dict[str, tuple[int, ...]]:
    """Shapes of files' tensors by the model's own names; raises `ValueError` if two have one name."""
    own: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if (new := rename(name)) is None:
            continue
        if new in own:
            raise ValueError(f"its files hold {new!r} twice, under several names")
        own[new] = shape
    return own


def finish_text_encoder(model: Qwen2_5_VLTextModel, device: torch.device | str) -> None:
    """Give a language model made on the meta device the frequencies of its rotary embedding."""
    with torch.device("cpu"):
        model.rotary_emb = type(model.rotary_emb)(model.config).to(device)


def finish_writer(model: Qwen2_5_VLForConditionalGeneration, device: torch.device | str) -> None:
    """Likewise its language model and its vision tower."""
    finish_text_encoder(model.model.language_model, device)
    visual = model.model.visual
    if visual is not None:
        with torch.device("cpu"):
            visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.config).to(device)


def finish_text_encoder_2(model: CLIPTextModel, device: torch.device | str) -> None:
    """Give a CLIP text model made on the meta device the numbers of its positions."""
    positions = torch.arange(model.config.max_position_embeddings, device=device)[None]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)


def _nested(config: Mapping[str, Any], types: tuple[str, ...]) -> Mapping[str, Any]:
    """The part of a configuration that is of the text model."""
    if config.get("model_type") not in types:
        raise ValueError(f"model_type is {config.get('model_type')!r}, but must be {' or '.join(map(repr, types))}")
    own = config.get("text_config", config)
    if not isinstance(own, Mapping):
        raise ValueError(f"text_config is {own!r}, but must be a mapping")
    return own


def _count(value: object) -> int:
    return positive("mrope_section", value)
