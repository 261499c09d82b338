"""What Wan's clips are prepared with: the VAE's encoder, the text encoder, and what shows the transformer pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wan.checkpoints.fingerprints import fingerprint_models
from wan.config.settings import VideoSettings
from wan.models.checkpoint import TOKENIZER_FILE, Checkpoint
from wan.models.wan import components
from wan.models.wan.image_encoder import clip_pixels, image_encoder_component, image_states, load_image_encoder
from wan.models.wan.kinds import kind_of
from wan.models.wan.latents import encode
from wan.models.wan.layout import IMAGE_ENCODER
from wan.models.wan.picture import given_frames
from wan.models.wan.text import cut_note, tokenize
from wan.models.wan.vae import speed_up_encoder
from wan.models.wan.whole_clips import posterior, take_whole_clips


class WanClipEncoder:
    """The VAE, its encoder in `vae_dtype`, text encoder and tokenizer, and the image encoder of a kind that has one; a
    `wan.models.training.ClipEncoder`.

    whole_clips: encode clips in one pass rather than by chunks of four frames
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, vae_dtype: torch.dtype, whole_clips: bool):
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
        reading = (checkpoint.tokenizer_folder / TOKENIZER_FILE).read_bytes() + str(self.length).encode()
        self.fingerprints["text_encoder"] = fingerprint_models(reading, self.text_encoder)
        self.kind, self.image_encoder = kind_of(checkpoint.layout), None
        if IMAGE_ENCODER in checkpoint.component_files:
            self.image_encoder = load_image_encoder(image_encoder_component(checkpoint), device)
            self.fingerprints["image_encoder"] = fingerprint_models(b"", self.image_encoder)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Float32 latents (B, C, T, h, w) of a video (B, 3, 4 T - 3 frames, height, width) in [-1, 1]."""
        return encode(self.vae, video, self.posterior)

    def beside(self, videos: Tensor) -> list[dict[str, Tensor]]:
        """Of each of uint8 videos (B, frames, height, width, 3), whose first frame, and last one, is given: "given",
        the latents (C, T, h, w) of these among grey frames, and "pictures", their states (pictures, tokens, C).

        What a transformer of the kind does not see is left out. Raises `InputError` for videos too short for both.
        """
        return [self._given(video) for video in videos.cpu().numpy()]

    @torch.no_grad()
    def _given(self, video: np.ndarray) -> dict[str, Tensor]:
        if "image" not in self.kind.inputs.required:
            return {}
        pictures = [video[0], video[-1]] if "last_image" in self.kind.inputs.required else [video[0]]
        frames, height, width, _ = video.shape
        own = VideoSettings((width, height), frames, geometry=self.kind.geometry)
        given = {"given": self.encode(given_frames(own, *pictures).to(self.device))[0].cpu()}
        if self.image_encoder is not None:
            pixels = torch.cat([clip_pixels(one, self.image_encoder.config.image_size) for one in pictures])
            given["pictures"] = image_states(self.image_encoder, pixels).cpu()
        return given

    @torch.no_grad()
    def states(self, captions: list[str]) -> list[dict[str, Tensor]]:
        """The text states of each caption, (L, C) on the CPU, without the rows past its end."""
        ids, mask = tokenize(self.tokenizer, captions, self.length)
        states = self.text_encoder(ids.to(self.device), mask.to(self.device)).last_hidden_state.cpu()
        return [{"text": state[: row.sum()]} for state, row in zip(states, mask)]

    def cut_notes(self, captions: list[str]) -> list[str]:
        """A line for each caption that is longer than the text encoder takes."""
        return [note for one in captions if (note := cut_note(self.tokenizer, one, self.length)) is not None]
