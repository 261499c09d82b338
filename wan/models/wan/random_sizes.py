"""The sizes of Wan's models, and what they and their videos weigh: for random weights and for plans."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wan.config.settings import VideoSettings
from wan.memory.decoding import vae_dtype_of
from wan.memory.estimates import FLOAT32_BYTES, Weights, Workload
from wan.memory.weigh import weigh
from wan.models.wan.latent_statistics import WAN22
from wan.models.wan.memory import video_workload
from wan.models.wan.processor import blocks_of

FREQ_DIM = 256
# Of what a picture takes in an image-to-video model beside the noise: its mask and latents, and those of a picture.
GIVEN_CHANNELS = 20


@dataclass(frozen=True)
class PictureTower:
    """CLIP's picture tower. patch, size: in pixels"""

    dim: int = 1280
    heads: int = 16
    layers: int = 32
    ffn_dim: int = 5120
    patch: int = 14
    size: int = 224

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2 + 1


@dataclass(frozen=True)
class Sizes:
    """The sizes that tell Wan's models apart; all else is common to them.

    kind: of `wan.models.wan.kinds`; experts: transformers of these sizes that each have some of the steps
    beside: channels that its transformer is given beside the noise
    tower: of those that see pictures by CLIP, and as how many
    vace_layers: those that hints of VACE's own blocks are added behind
    vae_decoder_dim: 0 for Wan2.1's VAE, whose decoder is as wide as its encoder
    """

    dim: int
    heads: int
    layers: int
    ffn_dim: int
    text_dim: int = 4096
    text_heads: int = 64
    text_layers: int = 24
    text_ffn_dim: int = 10240
    vocabulary: int = 256384
    vae_dim: int = 96
    kind: str = "t2v"
    experts: int = 1
    beside: int = 0
    tower: PictureTower | None = None
    pictures: int = 1
    vace_layers: tuple[int, ...] = ()
    vae_decoder_dim: int = 0

    @property
    def latent_channels(self) -> int:
        return len(WAN22["latents_mean"]) if self.vae_decoder_dim else 16


def _nano(kind: str, vae: tuple[int, int] = (8, 0), **own: Any) -> Sizes:
    text = {"text_dim": 64, "text_heads": 4, "text_layers": 2, "text_ffn_dim": 128, "vocabulary": 512}
    return Sizes(128, 2, 2, 256, **text, vae_dim=vae[0], vae_decoder_dim=vae[1], kind=kind, **own)


def _large(kind: str, **own: Any) -> Sizes:
    return Sizes(5120, 40, 40, 13824, kind=kind, **own)


SMALL_TOWER = PictureTower(160, 2, 2, 320, 14, 42)
MODELS = {
    "nano": _nano("t2v"),
    "i2v-nano": _nano("i2v", beside=GIVEN_CHANNELS, tower=SMALL_TOWER),
    "flf2v-nano": _nano("flf2v", beside=GIVEN_CHANNELS, tower=SMALL_TOWER, pictures=2),
    "vace-nano": _nano("vace", vace_layers=(0,)),
    "t2v-A14B-nano": _nano("t2v-A14B", experts=2),
    "i2v-A14B-nano": _nano("i2v-A14B", experts=2, beside=GIVEN_CHANNELS),
    "ti2v-5B-nano": _nano("ti2v-5B", vae=(8, 16)),
    "t2v-1.3B": Sizes(1536, 12, 30, 8960),
    "t2v-14B": _large("t2v"),
    "i2v-14B": _large("i2v", beside=GIVEN_CHANNELS, tower=PictureTower()),
    "flf2v-14B": _large("flf2v", beside=GIVEN_CHANNELS, tower=PictureTower(), pictures=2),
    "vace-1.3B": Sizes(1536, 12, 30, 8960, kind="vace", vace_layers=tuple(range(0, 30, 2))),
    "vace-14B": _large("vace", vace_layers=tuple(range(0, 40, 5))),
    "t2v-A14B": _large("t2v-A14B", experts=2),
    "i2v-A14B": _large("i2v-A14B", experts=2, beside=GIVEN_CHANNELS),
    "ti2v-5B": Sizes(3072, 24, 30, 14336, kind="ti2v-5B", vae_dim=160, vae_decoder_dim=256),
}


def meta_transformer(sizes: Sizes, layers: int | None = None) -> WanTransformer3DModel:
    """A transformer on the meta device, with so many layers instead of its own."""
    layers = sizes.layers if layers is None else layers
    config: dict[str, Any] = {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.dim // sizes.heads,
        "in_channels": sizes.latent_channels + sizes.beside,
        "out_channels": sizes.latent_channels,
        "text_dim": sizes.text_dim,
        "freq_dim": FREQ_DIM,
        "ffn_dim": sizes.ffn_dim,
        "num_layers": layers,
    }
    if sizes.tower is not None:
        config |= {"image_dim": sizes.tower.dim, "added_kv_proj_dim": sizes.dim}
        config |= {"pos_embed_seq_len": sizes.pictures * sizes.tower.tokens} if sizes.pictures > 1 else {}
    with torch.device("meta"):
        if sizes.vace_layers:
            return WanVACETransformer3DModel(**config, vace_layers=[n for n in sizes.vace_layers if n < layers])
        return WanTransformer3DModel(**config)


def meta_text_encoder(sizes: Sizes) -> UMT5EncoderModel:
    """The text encoder on the meta device."""
    config = UMT5Config(
        vocab_size=sizes.vocabulary,
        d_model=sizes.text_dim,
        d_kv=sizes.text_dim // sizes.text_heads,
        d_ff=sizes.text_ffn_dim,
        num_layers=sizes.text_layers,
        num_heads=sizes.text_heads,
    )
    with torch.device("meta"):
        return UMT5EncoderModel(config)


def vae_config(sizes: Sizes) -> dict[str, Any]:
    """The configuration of `AutoencoderKLWan`."""
    if not sizes.vae_decoder_dim:
        return {"base_dim": sizes.vae_dim}
    # Pictures are cut into squares of 2 by 2 pixels of three colours.
    patch = 2
    return {
        "base_dim": sizes.vae_dim,
        "decoder_base_dim": sizes.vae_decoder_dim,
        "z_dim": sizes.latent_channels,
        "is_residual": True,
        "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2,
        "patch_size": patch,
        "scale_factor_spatial": 16,
        "temperal_downsample": [False, True, True],
        **{name: list(values) for name, values in WAN22.items()},
    }


def meta_vae(sizes: Sizes) -> AutoencoderKLWan:
    """The VAE on the meta device."""
    with torch.device("meta"):
        return AutoencoderKLWan(**vae_config(sizes))


def meta_picture_tower(tower: PictureTower) -> CLIPVisionModel:
    """CLIP's picture tower on the meta device."""
    config = CLIPVisionConfig(
        hidden_size=tower.dim,
        intermediate_size=tower.ffn_dim,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.size,
        patch_size=tower.patch,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        return CLIPVisionModel(config)


@functools.cache
def weigh_models(sizes: Sizes, dtype: torch.dtype, layers: int | None = None) -> tuple[Weights, Weights, int]:
    """What `planner.choose` has to know of the models: a transformer, text encoder, and bytes of the VAE in float32."""
    transformer, text, vae = _meta_models(sizes)
    if layers is not None:
        transformer = meta_transformer(sizes, layers)
    return (
        weigh(transformer, blocks_of(transformer), dtype, transformer._keep_in_fp32_modules),
        weigh(text, text.encoder.block, dtype, ()),
        vae.num_parameters() * FLOAT32_BYTES,
    )


@functools.cache
def others_of(sizes: Sizes) -> dict[str, int]:
    """What it has to know besides, by the names of its arguments: how many experts there are, and of CLIP's tower."""
    tower = 0 if sizes.tower is None else meta_picture_tower(sizes.tower).num_parameters() * FLOAT32_BYTES
    return {"experts": sizes.experts, "picture_bytes": tower}


@functools.cache
def workload_for(sizes: Sizes, video: VideoSettings, dtype: torch.dtype, has_picture: bool = True) -> Workload:
    """And of a video that they make on a GPU, their blocks compiled, of a picture if it may be of one."""
    return video_workload(*_meta_models(sizes), video, has_picture, dtype, vae_dtype_of(None, dtype))


@functools.cache
def _meta_models(sizes: Sizes) -> tuple[nn.Module, nn.Module, nn.Module]:
    return meta_transformer(sizes), meta_text_encoder(sizes), meta_vae(sizes)
