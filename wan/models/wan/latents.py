"""Between pixels and the latents that the transformer sees: the VAE with its statistics taken out and put back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from wan.config.settings import VideoSettings
from wan.models.wan.vae import decoder_dtype, geometry_by, set_encoding_tiles, set_tiles, speed_up_decoder

log = logging.getLogger("wan")


def encode(
    vae: AutoencoderKLWan, video: Tensor, posterior: Callable[[AutoencoderKLWan, Tensor], Any] | None = None
) -> Tensor:
    """Float32 latents (B, C, T, h, w) of a video (B, 3, 4 T - 3 frames, height, width) in [-1, 1].

    posterior: gives the latents' distribution in another way than `vae.encode`, by chunks of four frames
    Where a GPU has too little memory left it is encoded in overlapping tiles, which changes them slightly; a line of
    the log says so.
    Raises `InputError` for frames or sizes that the VAE would drop or crop.
    """
    frames, height, width = video.shape[2:]
    geometry_by(vae).check_whole((width, height), frames)
    video = video.to(vae.encoder.conv_in.weight.dtype)
    set_encoding_tiles(vae, video)
    distribution = vae.encode(video).latent_dist if posterior is None else posterior(vae, video)
    # The mean, not a sample, as in the published program.
    moments = distribution.mode().float()
    mean, deviation = _statistics(vae, moments)
    return (moments - mean) / deviation


def draw_noise(transformer: nn.Module, video: VideoSettings, seed: int, device: torch.device) -> Tensor:
    """Float32 noise (1, C, T, h, w) for a video."""
    # Not those that it takes, which may be more than the noise.
    shape = 1, transformer.config.out_channels, *video.latents_size
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=torch.float32)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Float32 video (B, 3, 4 T - 3 frames, height, width) in [-1, 1] of latents (B, C, T, h, w).

    Where a GPU has too little memory left the picture is decoded in overlapping tiles, which changes it slightly; and
    where float16 overflows it is decoded again in float32, as are later ones. A line of the log says so.
    """
    latents = latents.float()
    mean, deviation = _statistics(vae, latents)
    latents = (latents * deviation + mean).to(decoder_dtype(vae))
    set_tiles(vae, latents)
    video = vae.decode(latents).sample.float()
    if latents.dtype == torch.float16 and not video.isfinite().all():
        log.warning("warning: decoding overflowed in float16, so the decoder goes on in float32, weights rounded")
        # Before decoding in float32, which takes twice the memory; hence also other tiles.
        del video
        speed_up_decoder(vae, torch.float32)
        latents = latents.float()
        set_tiles(vae, latents)
        video = vae.decode(latents).sample
    return video


def glimpse(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Float32 picture (B, 3, height, width) in [-1, 1] of the first frame of latents (B, C, T, h, w).

    It costs a fraction of decoding them all, and leaves the decoder as it is. Only the first needs no others: a VAE
    sees it apart, and would read a later one in other colours.
    """
    latents = latents[:, :, :1].float()
    mean, deviation = _statistics(vae, latents)
    latents = (latents * deviation + mean).to(decoder_dtype(vae))
    set_tiles(vae, latents)
    # What overflows in float16 is left grey, black or white: decoding again would change the decoder.
    return vae.decode(latents).sample[:, :, 0].float().nan_to_num()


def _statistics(vae: AutoencoderKLWan, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, shaped for latents."""
    config = vae.config
    return tuple(
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents) for values in (config.latents_mean, config.latents_std)
    )
