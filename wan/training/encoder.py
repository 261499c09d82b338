"""The VAE's encoder and the text encoder that clips are prepared with, and prompts of samples encoded."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla import InputError
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.latents import encode
from wan.models.wan.text import cut_note, tokenize
from wan.models.wan.vae import speed_up_encoder
from wan.models.wan.whole_clips import posterior, take_whole_clips
from wan.training.fingerprints import fingerprint_models


class Encoder:
    """The VAE, its encoder in `vae_dtype`, text encoder and tokenizer of a checkpoint, which needs no transformer.

    whole_clips: encode clips in one pass rather than by chunks of four frames
    `fingerprints` tells its VAE's encoder and its text encoder with the tokenizer from others.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        vae_dtype: torch.dtype = torch.float32,
        whole_clips: bool = False,
    ):
        checkpoint.require_tokenizer()
        self.device, self.length = device, checkpoint.text_length
        self.vae = components.vae_component(checkpoint).load(torch.float32, device)
        # Latents are normalised by them, so clips of other statistics are others. Before the encoder is made faster,
        # which changes types and layouts.
        statistics = repr((list(self.vae.config.latents_mean), list(self.vae.config.latents_std)))
        self.fingerprints = {"vae": fingerprint_models(statistics.encode(), self.vae.encoder, self.vae.quant_conv)}
        speed_up_encoder(self.vae, vae_dtype)
        self.posterior = posterior if whole_clips else None
        if whole_clips:
            take_whole_clips(self.vae.encoder)
        # CPUs may have no instructions for bfloat16, in which it takes a hundred times as long.
        text_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.text_encoder = components.text_encoder_component(checkpoint, text_dtype).load(text_dtype, device)
        self.tokenizer = components.load_tokenizer(checkpoint, self.text_encoder.config.vocab_size)
        # What else decides which tokens the encoder sees.
        reading = (checkpoint.tokenizer_folder / "tokenizer.json").read_bytes() + str(self.length).encode()
        self.fingerprints["text_encoder"] = fingerprint_models(reading, self.text_encoder)

    @torch.no_grad()
    def latents(self, videos: Tensor) -> Tensor:
        """(B, C, T, h, w) float32 of uint8 videos (B, frames, H, W, 3); raises `InputError` if they overflow."""
        pixels = videos.to(self.device, non_blocking=True).permute(0, 4, 1, 2, 3)
        latents = encode(self.vae, pixels.float() / 127.5 - 1, self.posterior)
        if not latents.isfinite().all():
            raise InputError("the VAE's encoder gives values that are not finite; prepare with vae_dtype float32")
        return latents

    @torch.no_grad()
    def text(self, captions: list[str]) -> list[Tensor]:
        """The states of each caption, (L, C) on the CPU, without the rows past its end."""
        ids, mask = tokenize(self.tokenizer, captions, self.length)
        states = self.text_encoder(ids.to(self.device), mask.to(self.device)).last_hidden_state.cpu()
        return [state[: row.sum()] for state, row in zip(states, mask)]

    def cut_notes(self, captions: list[str]) -> list[str]:
        """A line for each caption that is longer than the text encoder takes."""
        return [note for one in captions if (note := cut_note(self.tokenizer, one, self.length)) is not None]
