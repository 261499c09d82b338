"""The mean and deviation of a VAE's latents, a value a channel, moved from its configuration into its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STATISTICS = ("latents_mean", "latents_std")


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
