"""Between pixels and the latents that the transformer sees: videos, their first frame, and pictures."""

from __future__ import annotations

import logging

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from nabla import InputError
from wan.config.settings import VideoSettings
from wan.models.kandinsky.geometry import GEOMETRY
from wan.models.kandinsky.vae import decode_windows, decoder_dtype, prepare_decoder, set_tiles

log = logging.getLogger("wan")

# Of a video that begins with a picture: latent frames that are brought nearer to those after them, and of these how
# many count; how far their mean may fall and rise, and their deviation.
FIRST_FRAMES, NEXT_FRAMES = 4, 5
MEAN_RANGE, DEVIATION_RANGE = (-0.05, 0.1), (-0.1, 0.25)


def decode(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """Float32 video (B, 3, 4 T - 3 frames, height, width) of about [-1, 1], of latents (B, C, T, h, w).

    Where a GPU has too little memory left the picture is decoded in overlapping tiles, which changes it slightly; and
    where float16 overflows it is decoded again in float32, as are later ones. A line of the log says so.
    """
    latents = _unscaled(vae, latents)
    set_tiles(vae, latents)
    video = _joined(vae, latents)
    if latents.dtype == torch.float16 and not video.isfinite().all():
        log.warning("warning: decoding overflowed in float16, so the decoder goes on in float32, weights rounded")
        # Before decoding in float32, which takes twice the memory; hence also other tiles.
        del video
        prepare_decoder(vae, torch.float32)
        latents = latents.float()
        set_tiles(vae, latents)
        video = _joined(vae, latents)
    return video


def _joined(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    return torch.cat([piece.float() for piece in decode_windows(vae, latents)], dim=2)


def glimpse(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """Float32 picture (B, 3, height, width) of about [-1, 1] of the first frame of latents (B, C, T, h, w).

    It costs a fraction of decoding them all, and leaves the decoder as it is.
    """
    latents = _unscaled(vae, latents[:, :, :1])
    set_tiles(vae, latents)
    # What overflows in float16 is left grey, black or white: decoding again would change the decoder.
    (frame,) = decode_windows(vae, latents)
    return frame[:, :, 0].float().nan_to_num()


def draw_noise(transformer: nn.Module, video: VideoSettings, seed: int, device: torch.device) -> Tensor:
    """Float32 noise (1, C, T, h, w) for a video, drawn with channels last, as the published program does."""
    shape = *video.latents_size, transformer.config.out_visual_dim
    noise = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=torch.float32)
    return channels_first(noise).contiguous()


def encode_picture(vae: AutoencoderKLHunyuanVideo, picture: Tensor, seed: int | None = None) -> Tensor:
    """Float32 latents (B, C, 1, h, w) of a picture (B, 3, 1, height, width) in [-1, 1].

    seed: draws them of the distribution that the encoder gives, as the published program does; None for its mean
    Raises `InputError` for a size that the VAE would crop.
    """
    frames, height, width = picture.shape[2:]
    _, h, w = GEOMETRY.vae_stride
    if frames != 1 or height % h or width % w:
        raise InputError(f"a picture of {width}*{height} cannot be encoded whole; both must be multiples of {h}")
    # An earlier video may have switched tiles on.
    vae.use_tiling = False
    distribution = vae.encode(picture.to(vae.encoder.conv_in.conv.weight.dtype)).latent_dist
    if seed is None:
        latents = distribution.mode()
    else:
        latents = distribution.sample(torch.Generator(picture.device).manual_seed(seed))
    return latents.float() * vae.config.scaling_factor


def begin_with(latents: Tensor, first_frame: Tensor) -> Tensor:
    """Sampled latents (B, C, T, h, w) with those of a picture, (1 or B, C, 1, h, w), in the first frame, and the frames
    after it in its colours.
    """
    first_frame = first_frame.to(latents).expand(len(latents), -1, -1, -1, -1)
    return normalize_first_frame(torch.cat((first_frame, latents[:, :, 1:]), dim=2))


def normalize_first_frame(latents: Tensor) -> Tensor:
    """Latents (B, C, T, h, w) whose first four frames have each been brought nearer in mean and deviation to the five
    after them, since those that lie close to a given picture come out in other colours.
    """
    first, others = latents[:, :, :FIRST_FRAMES], latents[:, :, FIRST_FRAMES : FIRST_FRAMES + NEXT_FRAMES]
    if others.shape[2] == 0:
        return latents
    # Of each frame over its channels and places, and of the frames after them all together.
    own, all_others = (1, 3, 4), (1, 2, 3, 4)
    mean, deviation = first.mean(own, keepdim=True), first.std(own, keepdim=True)
    low, high = MEAN_RANGE
    new_mean = torch.clamp(others.mean(all_others, keepdim=True), mean + low, mean + high)
    low, high = DEVIATION_RANGE
    new_deviation = torch.clamp(others.std(all_others, keepdim=True), deviation + low, deviation + high)
    first = (first - mean) / deviation * new_deviation + new_mean
    return torch.cat((first, latents[:, :, FIRST_FRAMES:]), dim=2)


def channels_first(x: Tensor) -> Tensor:
    """(T, h, w, C), or a batch of such, to (B, C, T, h, w)."""
    return (x if x.ndim == 5 else x[None]).movedim(-1, 1)


def _unscaled(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """Latents as the decoder takes them, in its type."""
    return (latents.float() / vae.config.scaling_factor).to(decoder_dtype(vae))
