"""Text to video, or text and the picture that a video begins with, which takes the place of its first latent frame."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from wan.config.settings import VideoSettings, changed
from wan.models.wan import memory
from wan.models.wan.condition import Condition, Guidance, both_branches, fitting, from_leader, guidance_of
from wan.models.wan.inputs import check_given
from wan.models.wan.kinds import KINDS
from wan.models.wan.picture import covering
from wan.models.wan.pipeline import WanT2V
from wan.models.wan.processor import grid_of, velocity_of
from wan.models.wan.sizes import fit_within
from wan.sampling.loop import Conditions
from wan.sampling.request import VideoRequest


class WanTI2V(WanT2V):
    """Wan2.2's small model, of text alone or of a picture too.

    A picture's latents are put in place of the first frame's, again and again, and the transformer is told that they
    are clean: each of its tokens has a timestep of its own then, and so a modulation, which takes 6 times the memory
    of the tokens themselves in every forward.
    """

    def check_inputs(self, given: Collection[str]) -> None:
        check_given(given, KINDS["ti2v-5B"].inputs)

    def fit_size(self, request: VideoRequest) -> VideoSettings:
        if request.image is None:
            return request.video
        height, width, _ = request.image.shape
        return changed(request.video, size=fit_within((width, height), request.video.size))

    def predict(self, latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        """The velocity in float32 of latents (B, C, T, h, w) at timesteps (B,) in one guidance branch.

        That of a first frame that is given means nothing.
        """
        if guidance.given is not None:
            timestep = token_timesteps(timestep, grid_of(self.running, tuple(latents.shape[2:])))
        return velocity_of(self.running, latents, timestep, guidance.text)

    def batch_branches(self, conditions: Conditions, latents: Tensor) -> Guidance | None:
        """Both guidance branches as one batch, where a GPU has so much room that this is faster."""
        return both_branches(conditions) if memory.has_room_for_both(self.transformer, latents) else None

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

    def _guided(self, texts: Conditions, condition: Tensor | None, noise: Tensor | None = None) -> Conditions:
        if condition is None:
            return guidance_of(texts[:2], None, self.transformer.dtype)
        shape = self.transformer.config.out_channels, 1, None, None
        return guidance_of(texts[:2], fitting(condition, shape, self.device, noise), self.transformer.dtype)


def token_timesteps(timestep: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Timesteps (B, tokens) in float32 of a video's (B,), on a grid of (frames, rows, columns) whose first is clean."""
    frames, rows, columns = grid
    noisy = torch.ones(frames, rows * columns, device=timestep.device)
    noisy[0] = 0
    return timestep.float()[:, None] * noisy.flatten()
