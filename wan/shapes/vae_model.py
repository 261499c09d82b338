"""Wan's VAE as it is trained: its first weights, what a step computes, and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError
from torch import Tensor, nn

from nabla import InputError
from nabla.checks import is_count
from wan.models.wan.geometry import GEOMETRY
from wan.models.wan.whole_clips import posterior, reconstruction
from wan.shapes.vae_settings import LossSettings

# At first: of the logarithm of the latents' variance, since nothing is learned through noise as strong as the latents;
# and the gain of residual branches.
FIRST_LOG_VARIANCE, FIRST_GAIN = -6.0, 0.1
COLOURS = 3
STATISTICS = ("latents_mean", "latents_std")


def new_vae(sizes: Mapping[str, Any], seed: int) -> AutoencoderKLWan:
    """A VAE with the weights that training begins with, in float32.

    Convolutions keep the std of what they are given and residual branches add little to it. With torch's own
    weights each convolution weakens the picture beside its biases, and little of it reaches the latents: 180 small
    steps found no more than the mean colour.

    sizes: keys of diffusers' `AutoencoderKLWan`; raises `InputError` for others, and for other strides than Wan2.1's
    """
    torch.manual_seed(seed)
    _check_sizes(sizes)
    try:
        vae = AutoencoderKLWan(**sizes)
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"vae: {error}; its keys are those of diffusers' AutoencoderKLWan") from None
    if len(vae.config.dim_mult) != 4 or sum(vae.config.temperal_downsample) != 2 or vae.config.patch_size is not None:
        raise InputError(f"vae {dict(sizes)}: its strides must be Wan2.1's, {GEOMETRY.vae_stride}")
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            # The root of 1 / fan-in keeps the std of normalised inputs.
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                # The last convolution of a residual branch.
                module.conv2.weight.mul_(FIRST_GAIN)
        # Its second half of channels is the logarithm of the variance, as `DiagonalGaussianDistribution` splits them.
        vae.quant_conv.bias.chunk(2)[1].fill_(FIRST_LOG_VARIANCE)
    return vae


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    for name in ("base_dim", "decoder_base_dim", "z_dim", "num_res_blocks"):
        # Null makes the decoder as wide as the encoder.
        is_left = name not in sizes or (name == "decoder_base_dim" and sizes[name] is None)
        if not is_left and (not is_count(sizes[name]) or sizes[name] == 0):
            raise InputError(f"vae: {name} {sizes[name]!r} is not a positive integer")
    multiples = sizes.get("dim_mult", [1])
    if not isinstance(multiples, (list, tuple)) or not all(is_count(n) and n for n in multiples):
        raise InputError(f"vae: dim_mult {multiples!r} is not a list of positive integers; [1, 2, 4, 4] is Wan's")
    for name in ("in_channels", "out_channels"):
        if sizes.get(name, COLOURS) != COLOURS:
            raise InputError(f"vae: {name} {sizes[name]!r} must be {COLOURS}, as videos have; leave it out")


def trained_vae(folder: str, sizes: Mapping[str, Any]) -> AutoencoderKLWan:
    """A VAE from a folder in diffusers' layout, in float32. Raises `InputError` if it is not one, or of other sizes."""
    if not (Path(folder).expanduser() / "config.json").is_file():
        raise InputError(f"start {folder} is not the folder of a VAE; it would hold a config.json")
    try:
        # Else diffusers would take a pickle where there are no safetensors.
        vae = AutoencoderKLWan.from_pretrained(
            Path(folder).expanduser(), torch_dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"start {folder} cannot be read ({' '.join(str(error).split())[:200]}); give the folder vae of a run"
        ) from error
    for name, value in sizes.items():
        # Statistics are those of the weights, and found anew at the end.
        if name not in STATISTICS and vae.config.get(name) != value:
            raise InputError(f"start {folder}: its {name} is {vae.config.get(name)!r}, but {value!r} is asked for")
    return vae


class Autoencoder(nn.Module):
    """What a step of training computes, as one module, which can be compiled and spread over processes."""

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A video (B, 3, frames, height, width) from latents drawn about its own, and their distribution's parameters.

        noise: normally distributed, of the shape of the latents
        """
        latents = posterior(self.vae, video)
        return reconstruction(self.vae, latents.mean + latents.std * noise), latents.parameters

    def noise_for(self, video: Tensor, seed: int) -> Tensor:
        """Noise (B, C, T, h, w) for the latents of a video (B, 3, frames, height, width), on its device."""
        # 4n + 1 frames make n + 1; of rows and columns it is a plain division.
        frames, height, width = ((n - 1) // stride + 1 for n, stride in zip(video.shape[2:], GEOMETRY.vae_stride))
        generator = torch.Generator(video.device).manual_seed(seed)
        shape = len(video), self.vae.config.z_dim, frames, height, width
        return torch.randn(shape, generator=generator, device=video.device)


def vae_loss(video: Tensor, original: Tensor, latents: DiagonalGaussianDistribution, weights: LossSettings) -> Tensor:
    """The loss of each clip, (B,): the mean absolute error and, weighted, what `LossSettings` names."""
    error = video - original
    size = error[0].numel()
    # (B, 3, frames, height, width): the errors of the differences between neighbours along the last three.
    edges = sum(error.diff(dim=axis).abs().flatten(1).sum(1) / size for axis in (2, 3, 4))
    # Diffusers sums over the axes of a picture, which leaves one of a video's.
    divergence = latents.kl().flatten(1).sum(1) / latents.mean[0].numel()
    errors = error.abs().flatten(1).mean(1) + weights.squares * error.square().flatten(1).mean(1)
    return errors + weights.edges * edges + weights.kl * divergence


def psnr(video: Tensor, original: Tensor) -> Tensor:
    """Peak signal to noise of each clip, (B,), in dB; both videos in [-1, 1], what is outside clamped."""
    # The peak is 2, its square 4.
    return -10 * torch.log10(F.mse_loss(video.clamp(-1, 1), original, reduction="none").flatten(1).mean(1) / 4)
