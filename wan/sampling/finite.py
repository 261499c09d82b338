"""Numbers that overflowed: found where they are made, and said with what can make them so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.config.checks import guide_scale_text
from wan.config.model_settings import LoraFile
from wan.config.settings import SamplingSettings


def check_vae(vae: nn.Module, where: object) -> None:
    """Raise `CheckpointError` unless all weights are finite, before a video is made with them. where: they are from"""
    for name, weight in vae.named_parameters():
        if not weight.isfinite().all():
            dtype = str(weight.dtype).removeprefix("torch.")
            remedy = "get it again" if weight.dtype == torch.float32 else "try --vae_dtype float32, or get it again"
            raise CheckpointError(f"{where}: the VAE's {name!r} has values that are not finite in {dtype}; {remedy}")


def check_latents(
    latents: Tensor,
    sampling: SamplingSettings,
    dtype: torch.dtype,
    lora: Sequence[LoraFile],
    expert: str | None = None,
) -> None:
    """Raise `InputError` unless sampled latents are finite.

    dtype: of the transformer; lora: what it has merged; expert: which of several transformers it is
    """
    if latents.isfinite().all():
        return
    scale = guide_scale_text(sampling.guide_scale)
    ran = f"{sampling.steps} steps of {sampling.solver}, shift {sampling.shift}, guide_scale {scale}"
    whose = "the transformer's weights" if expert is None else f"the weights of the {expert}-noise expert, which ran"
    files = ", ".join(f"{one.file}:{one.scale:g}" for one in lora)
    hints = ["try --dtype bfloat16"] if dtype == torch.float16 else []
    hints += [f"lower the scales of LoRA files ({files})"] if files else []
    hints += ["go back to usual values where these are not", f"look at {whose}"]
    raise InputError(f"sampling gives values that are not finite, with {ran}; {', or '.join(hints)}")


def check_decoded(video: Tensor, latents: Tensor) -> None:
    """Raise `InputError` unless a video that a VAE has decoded from latents is finite."""
    # Of the extremes, which takes no memory of the video's size.
    if torch.stack(video.aminmax()).isfinite().all():
        return
    if not latents.isfinite().all():
        raise InputError("the latents to decode have values that are not finite; look at what they were made by")
    raise InputError("the VAE decodes to values that are not finite; its weights are damaged, so get them again")
