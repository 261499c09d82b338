"""The VAE of HunyuanVideo as Kandinsky-5 decodes with it: a window of frames at a time, in half precision on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from wan.memory.decoding import tiles_for
from wan.memory.estimates import TILE_OVERLAP, Decoding, tile_width
from wan.models.kandinsky.geometry import GEOMETRY
from wan.models.kandinsky.vae_layers import speed_up

# Of the published program: latent frames in a window, and how far apart windows begin. Each reads again what is before.
WINDOW, STRIDE = 5, 2
# Frames of video that two windows share.
SHARED = GEOMETRY.vae_stride[0] * STRIDE
# What a window's features take for a pixel of the picture: tensors of the published VAE, base width 128, that are there
# at once in float32 are 54,400 on a CPU; on a GPU, which normalises in one pass, 45,600 and what cuDNN takes.
DECODE_BYTES, DECODE_WIDTH = 56_000, 128


def prepare_decoder(vae: AutoencoderKLHunyuanVideo, dtype: torch.dtype) -> None:
    """Convert a VAE's decoder to `dtype`, in place; the encoder stays in its own. Layers of both then take fewer passes
    and less memory.
    """
    vae.post_quant_conv.to(dtype)
    vae.decoder.to(dtype)
    speed_up(vae)


def decoder_dtype(vae: AutoencoderKLHunyuanVideo) -> torch.dtype:
    return next(vae.decoder.parameters()).dtype


def decode_windows(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Iterator[Tensor]:
    """The frames of latents (B, C, T, h, w), unscaled, in pieces (B, 3, frames, height, width) that follow each other.

    As the published program cuts them: windows of 17 frames, of which 8 are new and 8 fade over from the last window;
    up to 5 latent frames in one. diffusers' own windows would end raggedly, and by default lie further apart.
    """
    frames = latents.shape[2]
    if frames <= WINDOW:
        yield decode_window(vae, latents)
        return
    window = decode_window(vae, latents[:, :, :WINDOW])
    yield window[:, :, :-SHARED]
    last = window[:, :, -SHARED:]
    # Where windows do not come out even, the last is a latent shorter.
    for start in range(STRIDE, frames - WINDOW + 2, STRIDE):
        # The first frame of a window is made of a latent that stands for four, and reads as one.
        window = decode_window(vae, latents[:, :, start : start + WINDOW])[:, :, 1:]
        yield _faded(last, window[:, :, :SHARED])
        last = window[:, :, SHARED:]
    yield last


def _faded(before: Tensor, after: Tensor) -> Tensor:
    """Frames (B, 3, n, height, width) that go over from the one to the other."""
    weight = torch.arange(after.shape[2], device=after.device).view(-1, 1, 1) / after.shape[2]
    return before * (1 - weight).to(before.dtype) + after * weight.to(after.dtype)


def decode_window(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """The frames of few latents, at once, in columns if the VAE is set to tiles."""
    if vae.use_tiling:
        return vae.tiled_decode(latents).sample
    return vae.decoder(vae.post_quant_conv(latents))


def decoding_of(size: tuple[int, int], frames: int, dtype: torch.dtype, width: int = DECODE_WIDTH) -> Decoding:
    """What a decoder of a base width makes, in a dtype. size: (width, height) of the picture in pixels"""
    features = DECODE_BYTES * dtype.itemsize / torch.float32.itemsize * width / DECODE_WIDTH
    return Decoding(size, frames, dtype.itemsize, features, GEOMETRY.frames_of(WINDOW))


def set_tiles(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> None:
    """Have a VAE decode latents (B, C, T, h, w) in as few columns as a GPU's memory asks for; says so if several."""
    # Larger latents may have switched it on before.
    vae.use_tiling = False
    size, frames = GEOMETRY.size_of(latents.shape[2:]), GEOMETRY.frames_of(latents.shape[2])
    decoding = decoding_of(size, frames, latents.dtype, vae.config.block_out_channels[0])
    tiles = tiles_for(decoding, latents.device)
    if tiles > 1:
        split_picture(vae, size, tiles)


def split_picture(vae: AutoencoderKLHunyuanVideo, size: tuple[int, int], tiles: int) -> None:
    """Have a VAE decode pictures of (width, height) in overlapping columns, which changes them slightly."""
    width, height = tile_width(size[0], tiles), size[1]
    # As high as the picture, so that tiles are columns; then how far apart they begin.
    vae.enable_tiling(
        tile_sample_min_height=height,
        tile_sample_min_width=width,
        tile_sample_stride_height=height,
        tile_sample_stride_width=width - TILE_OVERLAP,
    )
