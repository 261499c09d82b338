"""Text to video, or text and the picture that a video begins with, which takes the place of its first latent frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wan.models.wan.condition import Condition, Guidance, fitting, from_leader, guidance_of
from wan.models.wan.kinds import KINDS, Kind
from wan.models.wan.picture import covering
from wan.models.wan.pipeline import WanT2V
from wan.models.wan.processor import grid_of, velocity_of
from wan.sampling.loop import Conditions
from wan.sampling.request import VideoRequest


class WanTI2V(WanT2V):
    """Wan2.2's small model, of text alone or of a picture too.

    A picture's latents are put in place of the first frame's, again and again, and the transformer is told that they
    are clean: each of its tokens has a timestep of its own then, and so a modulation, which takes 6 times the memory
    of the tokens themselves in every forward.
    """

    @property
    def kind(self) -> Kind:
        return KINDS["ti2v-5B"]

    def guide(
        self, texts: Sequence[Tensor | None], condition: Tensor | None, noise: Tensor | None = None
    ) -> Conditions:
        shape = self.transformer.config.out_channels, 1, None, None
        fits = None if condition is None else fitting(condition, shape, self.device, noise)
        return guidance_of(texts, fits, self.transformer.dtype)

    def predict(self, latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        """The velocity in float32 of latents (B, C, T, h, w) at timesteps (B,) in one guidance branch.

        That of a first frame that is given means nothing.
        """
        if guidance.given is not None:
            timestep = token_timesteps(timestep, grid_of(self.running, tuple(latents.shape[2:])))
        return velocity_of(self.running, latents, timestep, guidance.text)

    def hold(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Latents (B, C, T, h, w) with those of the picture, if there is one, in the first frame."""
        given = conditions.prompt.given
        if given is None:
            return latents
        return torch.cat((given.expand(len(latents), -1, -1, -1, -1), latents[:, :, 1:]), dim=2)

    def _condition_of(self, request: VideoRequest) -> Condition | None:
        if request.image is None:
            return None
        made = None
        # Only who leads has the VAE.
        if self.vae is not None:
            frame = covering(request.image, request.video.size)[None, :, None]
            made = Condition.of(self.encode_video(frame)[0])
        return from_leader(made, self.distributed, self.device)


def token_timesteps(timestep: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Timesteps (B, tokens) in float32 of a video's (B,), on a grid of (frames, rows, columns) whose first is clean."""
    frames, rows, columns = grid
    noisy = torch.ones(frames, rows * columns, device=timestep.device)
    noisy[0] = 0
    return timestep.float()[:, None] * noisy.flatten()
