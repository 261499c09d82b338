"""The mean and deviation of a VAE's latents, a value a channel, moved from its configuration into its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STATISTICS = ("latents_mean", "latents_std")
# Of Wan2.2's VAE, constants of its program; those of Wan2.1's are the defaults of diffusers' class.
# fmt: off
WAN22 = {
    "latents_mean": (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    "latents_std": (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
}
# fmt: on


def fold_statistics(
    vae: Mapping[str, Tensor], own: Mapping[str, Any], constants: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The outer convolutions of a VAE whose latents have `own` statistics, for `constants` in their place.

    With mean m and deviation s of its own, M and S of the constants, and r = S / s, the encoder's mean becomes
    r (mean - m) + M and its log-variance grows by 2 log r; the decoder is given (latents - M) / r + m. Both are affine,
    so the latents without their statistics, and the video, stay the same but for rounding (and the bounds within
    which diffusers clamps a log-variance). What is stored in half precision becomes float32.
    vae: tensors by name; own, constants: `latents_mean` and `latents_std`, a value a channel
    """
    (mean, deviation), (constant_mean, constant_deviation) = (
        [torch.tensor(config[name], dtype=torch.float64) for name in STATISTICS] for config in (own, constants)
    )
    # The encoder's last layer gives the means of all channels and then their log-variances: its rows are scaled. The
    # decoder's first layer takes latents: its columns are scaled, since
    # W ((x - M) / r + m) + b = (W / r) x + b + W (m - M / r).
    ratio = constant_deviation / deviation
    names = [f"{layer}.{kind}" for layer in ("quant_conv", "post_quant_conv") for kind in ("weight", "bias")]
    encoder, encoder_bias, decoder, decoder_bias = (vae[name].double() for name in names)
    bias_of_mean, bias_of_variance = encoder_bias.chunk(2)
    folded = (
        encoder * torch.cat((ratio, torch.ones_like(ratio))).view(-1, 1, 1, 1, 1),
        torch.cat((ratio * (bias_of_mean - mean) + constant_mean, bias_of_variance + 2 * ratio.log())),
        decoder / ratio.view(1, -1, 1, 1, 1),
        decoder_bias + decoder.flatten(1) @ (mean - constant_mean / ratio),
    )
    return {name: tensor.to(torch.promote_types(vae[name].dtype, torch.float32)) for name, tensor in zip(names, folded)}
