"""The sizes of Kandinsky-5's models, and models of them on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel

from nabla import InputError, NablaConfig
from wan.config.settings import VideoSettings
from wan.memory.decoding import vae_dtype_of
from wan.memory.estimates import Workload
from wan.models.kandinsky.processor import rotation_bytes
from wan.models.kandinsky.random_text import ClipSizes, QwenSizes, Shapes, VisionSizes
from wan.models.kandinsky.vae import decoding_of

LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Sizes:
    """The sizes that tell Kandinsky-5's models apart; all else is common to them.

    file: what a transformer of them was published as; algorithm: the attention that diffusers' layout says
    """

    dim: int
    heads: int
    ff_dim: int
    time_dim: int
    text_blocks: int
    visual_blocks: int
    file: str
    algorithm: str | None = None
    qwen: QwenSizes = field(default_factory=QwenSizes)
    clip: ClipSizes = field(default_factory=ClipSizes)
    vae_channels: tuple[int, int, int, int] = (128, 256, 512, 512)
    vae_layers: int = 2
    vae_groups: int = 32


MODELS = {
    "kandinsky5-nano": Sizes(
        128,
        4,
        256,
        64,
        text_blocks=2,
        visual_blocks=3,
        file="kandinsky5lite_t2v_sft_10s",
        qwen=QwenSizes(
            64, 4, 2, layers=2, ffn_dim=128, vocabulary=1024, rope=(2, 3, 3), vision=VisionSizes(32, 2, 2, 64)
        ),
        clip=ClipSizes(32, 2, layers=2, ffn_dim=64, vocabulary=1024),
        vae_channels=(8, 8, 16, 16),
        vae_layers=1,
        vae_groups=4,
    ),
    "kandinsky5-lite": Sizes(1792, 28, 7168, 512, text_blocks=2, visual_blocks=32, file="kandinsky5lite_t2v_sft_10s"),
    "kandinsky5-pro": Sizes(
        4096,
        32,
        16384,
        1024,
        text_blocks=4,
        visual_blocks=60,
        file="kandinsky5pro_t2v_sft_5s",
        algorithm="nabla-0.8_sta-11-3-3",
    ),
}


def meta_transformer(
    sizes: Sizes, layers: int | None = None, algorithm: str | None = None
) -> Kandinsky5Transformer3DModel:
    """The transformer on the meta device, with so many visual blocks instead of its own."""
    head = sizes.dim // sizes.heads
    with torch.device("meta"):
        return Kandinsky5Transformer3DModel(
            in_visual_dim=LATENT_CHANNELS,
            out_visual_dim=LATENT_CHANNELS,
            in_text_dim=sizes.qwen.dim,
            in_text_dim2=sizes.clip.dim,
            time_dim=sizes.time_dim,
            model_dim=sizes.dim,
            ff_dim=sizes.ff_dim,
            num_text_blocks=sizes.text_blocks,
            num_visual_blocks=sizes.visual_blocks if layers is None else layers,
            axes_dims=(head // 4, 3 * head // 8, 3 * head // 8),
            visual_cond=True,
            **_attention_config(algorithm),
        )


def _attention_config(algorithm: str | None) -> dict[str, Any]:
    """What a configuration of diffusers says of attention."""
    if algorithm is None:
        return {"attention_type": "flash"}
    config = NablaConfig.parse(algorithm)
    if config.threshold is None or config.window is None:
        raise InputError(f"{algorithm!r} has no place in diffusers' layout; give a threshold and a window")
    frames, rows, columns = config.window
    return {
        "attention_type": "nabla",
        "attention_P": config.threshold,
        "attention_wT": frames,
        "attention_wH": rows,
        "attention_wW": columns,
        "attention_add_sta": True,
        "attention_method": "topcdf",
    }


def meta_vae(sizes: Sizes) -> AutoencoderKLHunyuanVideo:
    """The VAE on the meta device."""
    with torch.device("meta"):
        return AutoencoderKLHunyuanVideo(
            block_out_channels=sizes.vae_channels,
            layers_per_block=sizes.vae_layers,
            norm_num_groups=sizes.vae_groups,
        )


def transformer_shapes(sizes: Sizes) -> Shapes:
    """Names and shapes of the transformer's tensors, in either layout."""
    return {name: tuple(tensor.shape) for name, tensor in meta_transformer(sizes).state_dict().items()}


def vae_shapes(sizes: Sizes) -> Shapes:
    """Names and shapes of the VAE's tensors, in either layout."""
    return {name: tuple(tensor.shape) for name, tensor in meta_vae(sizes).state_dict().items()}


def workload_for(sizes: Sizes, video: VideoSettings, dtype: torch.dtype) -> Workload:
    """What `planner.choose` has to know of a video that the models make on a GPU, their blocks compiled."""
    tokens = math.prod(video.token_grid)
    return Workload(
        tokens=tokens,
        dim=sizes.dim,
        ffn_dim=sizes.ff_dim,
        heads=sizes.heads,
        text_dim=sizes.qwen.dim,
        decoding=decoding_of(video.size, video.frame_num, vae_dtype_of(None, dtype), sizes.vae_channels[0]),
        itemsize=dtype.itemsize,
        beside=rotation_bytes(tokens, sizes.dim // sizes.heads),
    )
