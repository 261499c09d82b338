"""Names of the published VAE files, of Wan2.1 and of Wan2.2, for the tensors of diffusers' `AutoencoderKLWan`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from diffusers import AutoencoderKLWan

Rule = tuple[str, str]

# Rules are applied in turn, each to what those before have made of a name.
RULES: tuple[Rule, ...] = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    # Norm, SiLU, convolution.
    (r"\.conv_out\.", ".head.2."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    # A residual is a Sequential: norm, SiLU, convolution, norm, SiLU, dropout, convolution.
    (r"\.(downsamples\.\d+|upsamples\.\d+|middle\.[02])\.norm1\.", r".\1.residual.0."),
    (r"\.(downsamples\.\d+|upsamples\.\d+|middle\.[02])\.conv1\.", r".\1.residual.2."),
    (r"\.(downsamples\.\d+|upsamples\.\d+|middle\.[02])\.norm2\.", r".\1.residual.3."),
    (r"\.(downsamples\.\d+|upsamples\.\d+|middle\.[02])\.conv2\.", r".\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def published_name(model: AutoencoderKLWan) -> Callable[[str], str]:
    """From the name of a tensor in a VAE to its published one."""
    own = model.config
    return partial(published_vae, residuals=own.num_res_blocks + 1, nested=own.is_residual)


def published_vae(name: str, residuals: int, nested: bool = False) -> str:
    """The published name of a tensor of `AutoencoderKLWan` with `residuals` residual blocks in a decoder stage.

    nested: stages hold their blocks, in the encoder too, as those of Wan2.2 do, whose shortcuts go past a whole stage.
    Wan2.1's number residual blocks, and what changes the size after them, through; diffusers numbers those of the
    decoder by stage.
    """
    if nested:
        name = _nested(name, residuals)
    elif stage := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", name):
        number = int(stage[1]) * (residuals + 1) + (int(stage[3]) if stage[2] == "resnets" else residuals)
        name = f"decoder.upsamples.{number}." + name[stage.end() :]
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def _nested(name: str, residuals: int) -> str:
    # A stage of the encoder has one residual block less than one of the decoder, and its last number likewise.
    for part, blocks, count in (("encoder", "down", residuals - 1), ("decoder", "up", residuals)):
        stage = rf"^({part})\.{blocks}_blocks\.(\d+)"
        name = re.sub(rf"{stage}\.resnets\.", rf"\1.{blocks}samples.\2.{blocks}samples.", name)
        name = re.sub(rf"{stage}\.{blocks}sampler\.", rf"\1.{blocks}samples.\2.{blocks}samples.{count}.", name)
    return name
