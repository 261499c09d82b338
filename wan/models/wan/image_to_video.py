"""Pictures to video: those that a video begins with, or begins and ends with, beside the noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nabla import InputError
from wan.memory.placement import on_device
from wan.models.wan.condition import Condition, Guidance, fitting, from_leader, guidance_of
from wan.models.wan.image_encoder import check_text_rows, clip_pixels, image_states
from wan.models.wan.kinds import KINDS, Kind
from wan.models.wan.picture import given_frames, given_mask
from wan.models.wan.pipeline import WanT2V
from wan.models.wan.processor import velocity_of
from wan.sampling.loop import Conditions
from wan.sampling.request import VideoRequest


class WanI2V(WanT2V):
    """Wan2.1's image-to-video and first-and-last-frame-to-video, and Wan2.2's image-to-video of two experts.

    The transformer sees channels of what is given beside the noise: of the mask, and latents of the video's pictures
    among grey frames. Wan2.1's sees states of the pictures too, before the text, by the image encoder.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.sees_states:
            check_text_rows(self.text_length)

    @property
    def sees_states(self) -> bool:
        """Whether the transformer sees states of pictures."""
        return self.transformer.config.image_dim is not None

    @property
    def sees_last(self) -> bool:
        """Whether videos end with a picture too, which a transformer with places for two sees."""
        return self.transformer.config.pos_embed_seq_len is not None

    @property
    def kind(self) -> Kind:
        if self.transformer_2 is not None:
            return KINDS["i2v-A14B"]
        return KINDS["flf2v" if self.sees_last else "i2v"]

    def guide(
        self, texts: Sequence[Tensor | None], condition: Tensor | None, noise: Tensor | None = None
    ) -> Conditions:
        channels = self.transformer.config.in_channels - self.transformer.config.out_channels
        fits = fitting(condition, (channels, None, None, None), self.device, noise)
        _check_states(fits.clip, self.transformer.config)
        return guidance_of(texts, fits, self.transformer.dtype)

    def predict(self, latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        """The velocity in float32 of latents (B, C, T, h, w) at timesteps (B,) in one guidance branch."""
        batch = len(latents)
        seen = torch.cat((latents, guidance.given.expand(batch, -1, -1, -1, -1)), dim=1)
        # Those of a video one after the other, as diffusers puts two together.
        states = None if guidance.pictures is None else guidance.pictures.repeat(batch, 1, 1)
        return velocity_of(self.running, seen, timestep, guidance.text, encoder_hidden_states_image=states)

    def _condition_of(self, request: VideoRequest) -> Condition:
        # Only who leads has the VAE, and the image encoder.
        made = None if self.vae is None else self._made_of(request)
        return from_leader(made, self.distributed, self.device)

    @torch.no_grad()
    def _made_of(self, request: VideoRequest) -> Condition:
        video, last = request.video, request.last_image
        latents = self.encode_video(given_frames(video, request.image, last))
        mask = given_mask(video, last is not None).to(latents)
        pictures = [request.image] if last is None else [request.image, last]
        states = self._states_of(pictures) if self.sees_states else None
        return Condition.of(torch.cat((mask, latents), dim=1)[0], states)

    def _states_of(self, pictures: Iterable[np.ndarray]) -> Tensor:
        """Float32 states (pictures, tokens, width) of pictures (height, width, 3) uint8 of any form."""
        with on_device(self.image_encoder, self.device, self.offload) as encoder:
            pixels = torch.cat([clip_pixels(picture, encoder.config.image_size) for picture in pictures])
            return image_states(encoder, pixels.to(self.device)).float()


def _check_states(states: Tensor | None, config: Any) -> None:
    """Raise `InputError` unless states (pictures, tokens, width) are those that a transformer sees, or None."""
    if config.image_dim is None:
        if states is not None:
            raise InputError("conditions have states of pictures, which this transformer does not see; give them as .y")
        return
    if states is None:
        raise InputError(
            "conditions lack states of pictures, which this transformer sees; give what pipe.condition gave"
        )
    places, own = config.pos_embed_seq_len, tuple(states.shape)
    # Two pictures share the places.
    wanted = (1, *own[1:2], config.image_dim) if places is None else (2, places // 2, config.image_dim)
    if own != wanted:
        raise InputError(f"states of pictures are of shape {own}, but must be of {wanted}")
