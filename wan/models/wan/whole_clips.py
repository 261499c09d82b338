"""Wan's VAE on whole clips in one pass, in place of diffusers' chunks of four frames: for training, and for speed."""

from __future__ import annotations

import functools

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
    WanUpsample,
    patchify,
    unpatchify,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from wan.models.wan.vae import causal_conv


def take_whole_clips(vae: nn.Module) -> None:
    """Give the layers of a VAE, or of its encoder alone, forwards that take a whole clip in one pass, in place.

    For `posterior` and `reconstruction`: diffusers' encode and decode, which give the same by chunks of four frames
    with five times as many kernels for 17 frames and nearly three times the memory traffic, no longer work on it.
    Its weights are as before.
    """
    for module in vae.modules():
        if isinstance(module, WanResample) and module.mode == "downsample3d":
            module.forward = functools.partial(_halve_frames, module)
        elif isinstance(module, WanResample) and module.mode == "upsample3d":
            module.forward = functools.partial(_double_frames, module)
        elif isinstance(module, WanCausalConv3d):
            module.forward = functools.partial(causal_conv, module)
        elif isinstance(module, WanRMS_norm):
            module.forward = functools.partial(_rms_norm, module)
        elif isinstance(module, WanUpsample):
            # Nearest neighbours are exact in every precision, so there is no need for diffusers' float32.
            module.forward = functools.partial(nn.Upsample.forward, module)
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=layout)


def posterior(vae: AutoencoderKLWan, video: Tensor) -> DiagonalGaussianDistribution:
    """The distribution of latents (B, C, T, h, w) of a video (B, 3, 4 T - 3, height, width) in [-1, 1], in float32."""
    if vae.config.patch_size is not None:
        video = patchify(video, vae.config.patch_size)
    return DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(video)).float())


def reconstruction(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The float32 video (B, 3, 4 T - 3, height, width) of latents; not clamped, which would stop gradients."""
    # The clip begins with it, which shortcuts past stages of Wan2.2's have to know.
    video = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    if vae.config.patch_size is not None:
        video = unpatchify(video, vae.config.patch_size)
    return video.float()


def _halve_frames(resample: WanResample, x: Tensor, feat_cache: None = None, feat_idx: None = None) -> Tensor:
    """Half the rows and columns, and of frames 0, 1, 2, ... the first as it is and one for every two after it."""
    x = _each_frame(resample.resample, x)
    # Three frames wide, in steps of two, without padding: 2 n + 1 frames give n, and the first goes before them.
    return torch.cat([x[:, :, :1], resample.time_conv(x)], dim=2) if x.shape[2] > 1 else x


def _double_frames(resample: WanResample, x: Tensor, feat_cache: None = None, feat_idx: None = None) -> Tensor:
    """Twice the rows and columns, and for each frame but the first two, which the first has no part in."""
    if x.shape[2] > 1:
        batch, channels, frames, height, width = x.shape
        # Two frames lie side by side in the channels, (B, 2 C, T - 1, h, w); they become neighbours in time.
        pairs = resample.time_conv(x[:, :, 1:]).view(batch, 2, channels, frames - 1, height, width)
        x = torch.cat([x[:, :, :1], pairs.movedim(1, 3).flatten(2, 3)], dim=2)
    return _each_frame(resample.resample, x)


def _each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    # (B, C, T, h, w) as pictures (B * T, C, h, w), and back.
    batch = len(x)
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)


def _rms_norm(norm: WanRMS_norm, x: Tensor) -> Tensor:
    """In fewer passes than diffusers', and with results of the input's dtype, which autocast else makes float32."""
    # The bound is that of F.normalize.
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp(min=1e-12)
    return x * (norm.scale / length).to(x.dtype) * norm.gamma.to(x.dtype)
