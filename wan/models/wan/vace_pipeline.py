"""Text to video under VACE's context: a video to keep parts of, where to make others, and pictures of what is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wan.config.settings import VideoSettings
from wan.memory.placement import on_device
from wan.models.wan.condition import Condition, Guidance, fitting, from_leader, guidance_of
from wan.models.wan.kinds import KINDS, Kind
from wan.models.wan.latents import encode
from wan.models.wan.pipeline import WanT2V
from wan.models.wan.processor import VACE_TRANSFORMER, velocity_of
from wan.models.wan.vace_condition import context_of, fitted_reference, source_frames
from wan.sampling.loop import Conditions
from wan.sampling.request import VideoRequest


class WanVACE(WanT2V):
    """Wan2.1 VACE. Its transformer's own blocks see the context, and what they make of it is added to the others'.

    Latents of reference pictures stand in front of those of the video in the context, and so does noise in the walk.
    What is given may all be left out: then all of the video is made anew.

    references: how many there are in the video that was last begun
    """

    transformer_spec = VACE_TRANSFORMER

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.references = 0

    @property
    def kind(self) -> Kind:
        return KINDS["vace"]

    def draw_noise(self, video: VideoSettings, seed: int, conditions: Conditions | None = None) -> Tensor:
        """Float32 noise (1, C, references + T, h, w), of as many frames as the context has."""
        if conditions is None:
            return super().draw_noise(video, seed)
        shape = 1, self.transformer.config.out_channels, *conditions.prompt.given.shape[2:]
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)

    def guide(
        self, texts: Sequence[Tensor | None], condition: Tensor | None, noise: Tensor | None = None
    ) -> Conditions:
        channels = self.transformer.config.vace_in_channels
        fits = fitting(condition, (channels, None, None, None), self.device, noise)
        self.references = fits.references
        # In the transformer's type once, rather than in every forward.
        return guidance_of(texts, fits.to(self.transformer.dtype), self.transformer.dtype)

    def predict(self, latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        """The velocity in float32 of latents (B, C, references + T, h, w) at timesteps (B,) in one guidance branch."""
        control = guidance.given.expand(len(latents), -1, -1, -1, -1)
        # One for each of its own blocks.
        scales = latents.new_full((len(self.running.config.vace_layers),), guidance.scale)
        more = {"control_hidden_states": control, "control_hidden_states_scale": scales}
        return velocity_of(self.running, latents, timestep, guidance.text, **more)

    def finish(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Sampled latents without the frames of reference pictures."""
        return latents[:, :, conditions.prompt.references :]

    def glimpse(self, latents: Tensor) -> Tensor:
        return super().glimpse(latents[:, :, self.references :])

    def _condition_of(self, request: VideoRequest) -> Condition:
        # Only who leads has the VAE.
        made = None if self.vae is None else self._made_of(request)
        return from_leader(made, self.distributed, self.device)

    @torch.no_grad()
    def _made_of(self, request: VideoRequest) -> Condition:
        video = request.video
        pixels, mask = source_frames(request.src_video, request.src_mask, video.size, video.frame_num)
        references = [fitted_reference(picture, video.size) for picture in request.src_ref_images]
        with on_device(self.vae, self.device, self.offload) as vae:
            context = context_of(lambda x: encode(vae, x[None].to(self.device))[0], pixels, mask, references)
        return Condition.of(context, references=len(references), context_scale=request.sampling.context_scale)
