"""Flow matching: velocity from noisy latents, at noise levels drawn and shifted.

The conventions are those of `wan.sampling.loop`: latents at sigma are (1 - sigma) clean + sigma noise, the model
predicts noise - clean, and is told 1000 sigma.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nabla import InputError
from wan.models.training import Texts, training_of
from wan.sampling.solvers import TRAIN_TIMESTEPS
from wan.training.objective_settings import ALL_TIMESTEPS, ObjectiveSettings

# Of all levels, how many a range has to hold: of fewer, rounding would decide which.
LEAST_SHARE = 1e-6


def sigmas_from_quantiles(quantiles: Tensor, settings: ObjectiveSettings) -> Tensor:
    """Noise levels, float32 in (0, 1), of float64 quantiles in (0, 1) of the distribution that the settings name.

    Where the settings leave out timesteps it is what is left of it: a quantile is one of the levels between them.
    Raises `InputError` if that is next to nothing.
    """
    low, high = (timestep / ALL_TIMESTEPS for timestep in settings.timestep_range)
    below, above = _share_below(low, settings), _share_below(high, settings)
    if above - below < LEAST_SHARE:
        raise InputError(
            f"min_timestep {settings.timestep_range[0]:g} and max_timestep {settings.timestep_range[1]:g} hold next to "
            f"none of the noise levels of {settings.timesteps} with shift {settings.shift:g}; take them further apart"
        )
    drawn = below + quantiles.double() * (above - below)
    if settings.timesteps == "logit_normal":
        # Logit-normal, by the inverse of the normal distribution function (Esser et al. 2024, arXiv 2403.03206).
        drawn = torch.sigmoid(settings.mean + settings.deviation * torch.special.ndtri(drawn))
    sigmas = settings.shift * drawn / (1 + (settings.shift - 1) * drawn)
    return sigmas.clamp(low, high).float()


def _share_below(sigma: float, settings: ObjectiveSettings) -> float:
    """Which share of all noise levels that the settings draw are below one."""
    drawn = torch.tensor(sigma / (settings.shift - (settings.shift - 1) * sigma), dtype=torch.float64)
    if settings.timesteps == "logit_normal":
        drawn = torch.special.ndtr((torch.logit(drawn) - settings.mean) / settings.deviation)
    return drawn.item()


def frame_levels(sigma: Tensor, frames: int, is_first_given: bool) -> Tensor:
    """Noise levels (frames,) of a clip's latent frames, of its own (), where the first, if it is given, has none."""
    levels = sigma.repeat(frames)
    if is_first_given:
        levels[0] = 0
    return levels


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Latents (B, C, T, h, w) with noise mixed in at sigmas, (B,), or (B, T) of latent frames."""
    sigmas = sigmas.view(len(sigmas), 1, -1, 1, 1)
    return (1 - sigmas) * latents + sigmas * noise


def predict_velocity(transformer: nn.Module, latents: Tensor, sigmas: Tensor, text: Texts) -> Tensor:
    """The float32 velocity that a transformer predicts for noisy latents (B, C, T, h, w) at sigmas and texts.

    sigmas: (B,), or (B, T) of latent frames
    """
    return training_of(transformer).velocity(transformer, latents, TRAIN_TIMESTEPS * sigmas, text)


def mse_per_clip(prediction: Tensor, target: Tensor, sigmas: Tensor | None = None) -> Tensor:
    """The mean squared error of each sample, (B,).

    sigmas: if it is (B, T), frames that have no noise, since they are given, do not count
    """
    errors = F.mse_loss(prediction, target, reduction="none")
    if sigmas is None or sigmas.ndim == 1:
        return errors.flatten(1).mean(1)
    counts = (sigmas > 0).float()
    return (errors.mean((1, 3, 4)) * counts).sum(1) / counts.sum(1)
