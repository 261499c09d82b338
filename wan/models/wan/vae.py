"""A faster VAE: channels last, fewer passes over the pictures, half precision on a GPU and oneDNN on a CPU.

Its time goes to passes over 81 full-size pictures of 96 channels more than to convolutions: the normalisation as
written takes ten, and every convolution copies its input to pad it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpsample,
)
from torch import Tensor, nn

from wan.config.geometry import Geometry
from wan.memory.decoding import tiles_for
from wan.memory.estimates import TILE_OVERLAP, Decoding, tile_width

# From how many numbers on a convolution on a CPU is oneDNN's. Torch goes by batch, channels, frames and rows alone, and
# leaves the middle layers of a clip to kernels that take five times as long.
ONEDNN_LEAST = 2**20 if torch.backends.mkldnn.is_available() else float("inf")


class Features(NamedTuple):
    """What the features of a part of a VAE take for each pixel of a frame, in float32 bytes, at a base width."""

    pixel_bytes: float
    width: int

    def at(self, width: int, dtype: torch.dtype) -> float:
        return self.pixel_bytes * dtype.itemsize / torch.float32.itemsize * width / self.width


# Of Wan2.1's and of Wan2.2's. That of Wan2.1's decoder was measured on a GPU; it is 1.14 times what the tensors take
# that are there at once, and so is the other.
DECODER_FEATURES = {False: Features(21_000, 96), True: Features(20_000, 256)}
# Of what torch takes of the GPU for them, since its pieces of many sizes leave gaps that no limit has room for: of
# Wan2.1's 16.6 GiB for 41 frames of 1280x720, where tensors take 12.4. Of Wan2.2's in the same proportion.
ENCODER_FEATURES = {False: Features(17_500, 96), True: Features(8_600, 160)}
# Of a first frame, which is encoded on its own, as a picture is.
FIRST_FRAME = 0.36


def speed_up_decoder(vae: AutoencoderKLWan, dtype: torch.dtype) -> None:
    """Convert a VAE's decoder to `dtype` and give its layers forwards of fewer passes, in place.

    The encoder stays as it is. In float32 the layers' results are the same up to rounding.
    """
    _speed_up(dtype, vae.post_quant_conv, vae.decoder)


def speed_up_encoder(vae: AutoencoderKLWan, dtype: torch.dtype) -> None:
    """The same for its encoder."""
    _speed_up(dtype, vae.encoder, vae.quant_conv)


def _speed_up(dtype: torch.dtype, *parts: nn.Module) -> None:
    for part in parts:
        part.to(dtype)
        for module in part.modules():
            if isinstance(module, WanCausalConv3d):
                module.forward = functools.partial(causal_conv, module)
            # All of Wan's are so; F.rms_norm has no bias.
            elif isinstance(module, WanRMS_norm) and module.channel_first and not torch.is_tensor(module.bias):
                module.forward = functools.partial(_rms_norm, module)
            elif isinstance(module, WanUpsample):
                # Nearest neighbours are exact in every precision, so there is no need for diffusers' float32.
                module.forward = functools.partial(nn.Upsample.forward, module)
            elif isinstance(module, WanResidualDownBlock):
                module.forward = functools.partial(_down_block, module)
            elif isinstance(module, WanResidualUpBlock):
                module.forward = functools.partial(_up_block, module)
        for weight in part.parameters():
            if weight.ndim in (4, 5):
                layout = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
                weight.data = weight.data.contiguous(memory_format=layout)


def geometry_by(vae: AutoencoderKLWan) -> Geometry:
    """How a VAE cuts pixels into latents; its patches are no transformer's."""
    rows = vae.config.scale_factor_spatial
    return Geometry((vae.config.scale_factor_temporal, rows, rows), (1, 1, 1))


def decoder_dtype(vae: AutoencoderKLWan) -> torch.dtype:
    return next(vae.decoder.parameters()).dtype


def causal_conv(conv: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Padding of rows and columns left to the convolution, and of frames only where there are no earlier ones.

    x: (B, C, T, h, w); cache_x: the frames before it, (B, C, up to 2, h, w), if there are any
    """
    # As F.pad takes it; diffusers empties `conv.padding` itself, and pads by this alone. The pad of frames is all in
    # front, so that a frame sees no later one.
    left, _, top, _, frames, _ = conv._padding
    if cache_x is not None and frames > 0:
        x = torch.cat([cache_x.to(x.device), x], dim=2)
        frames -= cache_x.shape[2]
    if frames > 0:
        x = F.pad(x, (0, 0, 0, 0, frames, 0))
    padding = 0, top, left
    could = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    if could and x.numel() >= ONEDNN_LEAST:
        return torch.mkldnn_convolution(x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups)
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def _rms_norm(norm: WanRMS_norm, x: Tensor) -> Tensor:
    # x / |x| * sqrt(C), as diffusers writes it, is x over the root of its mean square. Its bound of |x| is 1e-12, and
    # eps about the square of that: both matter for zeros alone.
    channels = x.shape[1]
    return F.rms_norm(x.movedim(1, -1), (channels,), norm.gamma.flatten(), eps=1e-24).movedim(-1, 1)


def _down_block(block: WanResidualDownBlock, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
    # Without the copy of its input that diffusers makes: no layer writes into it.
    hidden = x
    for layer in (*block.resnets, block.downsampler):
        if layer is not None:
            hidden = layer(hidden, feat_cache=feat_cache, feat_idx=feat_idx)
    return hidden + block.avg_shortcut(x)


def _up_block(
    block: WanResidualUpBlock, x: Tensor, feat_cache: Any = None, feat_idx: Any = None, first_chunk: bool = False
) -> Tensor:
    hidden = x
    for layer in (*block.resnets, block.upsampler):
        if layer is not None:
            hidden = layer(hidden, feat_cache=feat_cache, feat_idx=feat_idx)
    return hidden if block.avg_shortcut is None else hidden + block.avg_shortcut(x, first_chunk=first_chunk)


def decoding_of(
    size: tuple[int, int], frames: int, dtype: torch.dtype, config: Mapping[str, Any] | None = None
) -> Decoding:
    """What a VAE of a configuration, None: the published one of Wan2.1, decodes in a dtype.

    size: (width, height) of the picture in pixels
    """
    own = config or {}
    features = DECODER_FEATURES[own.get("is_residual", False)]
    width = own.get("decoder_base_dim") or own.get("base_dim", features.width)
    return Decoding(size, frames, dtype.itemsize, features.at(width, dtype))


def encoding_of(
    size: tuple[int, int], frames: int, dtype: torch.dtype, config: Mapping[str, Any] | None = None
) -> Decoding:
    """The same of what it encodes, which is of use to `wan.memory.estimates.decode_bytes` alike."""
    own = config or {}
    features = ENCODER_FEATURES[own.get("is_residual", False)]
    pixel_bytes = features.at(own.get("base_dim", features.width), dtype)
    return Decoding(size, frames, dtype.itemsize, pixel_bytes * (FIRST_FRAME if frames == 1 else 1))


def set_tiles(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Have a VAE decode latents (B, C, T, h, w) in as few columns as a GPU's memory asks for; says so if several."""
    # Larger latents may have switched it on before.
    vae.use_tiling = False
    geometry = geometry_by(vae)
    size, frames = geometry.size_of(latents.shape[2:]), geometry.frames_of(latents.shape[2])
    tiles = tiles_for(decoding_of(size, frames, latents.dtype, vae.config), latents.device)
    if tiles > 1:
        split_picture(vae, size, tiles)


def set_encoding_tiles(vae: AutoencoderKLWan, video: Tensor) -> None:
    """The same for a video (B, 3, frames, height, width) that is to be encoded."""
    # Decoding may have switched it on, and encodes in tiles too.
    vae.use_tiling = False
    frames, height, width = video.shape[2:]
    tiles = tiles_for(encoding_of((width, height), frames, video.dtype, vae.config), video.device, "encoding")
    if tiles > 1:
        # diffusers counts in what it has cut a picture into, here alone.
        split_picture(vae, (width, height), tiles, vae.config.patch_size or 1)


def split_picture(vae: AutoencoderKLWan, size: tuple[int, int], tiles: int, unit: int = 1) -> None:
    """Have a VAE work on pictures of (width, height) in overlapping columns, which changes them slightly.

    unit: pixels to what tiles are counted in
    """
    # As high as the picture, so that tiles are columns; then how far apart they begin.
    width, height = tile_width(size[0], tiles), size[1]
    vae.enable_tiling(height, width // unit, height, (width - TILE_OVERLAP) // unit)
