"""The encoders that clips are prepared with, and prompts of samples encoded."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla import InputError
from wan.models.checkpoint import Checkpoint
from wan.models.training import ClipEncoder, TrainingSpec


class Encoder:
    """The VAE, its encoder in `vae_dtype`, and the text encoders of a checkpoint, which needs no transformer.

    whole_clips: encode clips in one pass rather than by chunks of frames
    `fingerprints` tells its VAE's encoder and its text encoders with their tokenizers from others.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        vae_dtype: torch.dtype = torch.float32,
        whole_clips: bool = False,
    ):
        checkpoint.require_tokenizer()
        self.device, self.family, self.geometry = device, checkpoint.family, checkpoint.geometry
        training: TrainingSpec = self.family.load_training()
        self.facts = training.facts(checkpoint, None)
        self.own: ClipEncoder = training.open_encoder(checkpoint, device, vae_dtype, whole_clips)
        self.vae, self.fingerprints = self.own.vae, self.own.fingerprints
        self.cut_notes = self.own.cut_notes

    @torch.no_grad()
    def latents(self, videos: Tensor) -> Tensor:
        """(B, C, T, h, w) float32 of uint8 videos (B, frames, H, W, 3); raises `InputError` if they overflow."""
        pixels = videos.to(self.device, non_blocking=True).permute(0, 4, 1, 2, 3)
        latents = self.own.encode(pixels.float() / 127.5 - 1)
        _check_finite(latents)
        return latents

    def beside(self, videos: Tensor) -> list[dict[str, Tensor]]:
        """What is stored beside the latents of each of uint8 videos (B, frames, H, W, 3), by name, on the CPU.

        Raises `InputError` for what overflows.
        """
        beside = self.own.beside(videos)
        for one in beside:
            _check_finite(*one.values())
        return beside

    def text(self, captions: list[str]) -> list[dict[str, Tensor]]:
        """What is stored of each caption, on the CPU: "text" (L, C) without rows past its end, and others."""
        return self.own.states(captions)


def _check_finite(*encoded: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in encoded):
        raise InputError("the VAE's encoder gives values that are not finite; prepare with vae_dtype float32")
