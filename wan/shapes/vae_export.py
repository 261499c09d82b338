"""What comes of a VAE's training: a folder in diffusers' layout, a picture, and how good what was written is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from wan.files.atomic import atomic_path, remove
from wan.files.video import to_frames, write_image
from wan.models.wan import latents
from wan.models.wan.whole_clips import posterior
from wan.shapes.vae_data import as_input
from wan.shapes.vae_model import psnr

# Of the picture of reconstructions: frames a video, and how much stronger differences are drawn.
FRAMES, VIDEOS, DIFFERENCE = 3, 6, 4


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, videos: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and std (C,) of the latents, which are the modes, of videos (B, 3, frames, height, width)."""
    count, total, squares = 0, 0.0, 0.0
    for video in videos:
        # (positions, C), added up in float64, in which the variance as a difference of squares is exact enough.
        values = posterior(vae, video).mode().movedim(1, -1).flatten(0, -2).double()
        count, total, squares = count + len(values), total + values.sum(0), squares + values.square().sum(0)
    mean = total / count
    return mean, (squares / count - mean.square()).sqrt()


def export_vae(vae: AutoencoderKLWan, mean: Tensor, std: Tensor, dtype: torch.dtype, folder: Path) -> None:
    """Write a VAE's weights and its latents' statistics as diffusers' from_pretrained reads them."""
    statistics = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    sizes = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    # A new model, since statistics stand in its config, and since the trained one has forwards of its own.
    written = AutoencoderKLWan(**sizes | statistics)
    written.load_state_dict(vae.state_dict())
    with atomic_path(folder) as partial:
        # Diffusers' own `to` warns of parts to keep in float32, of which this model has none.
        nn.Module.to(written, dtype).save_pretrained(partial)
        # A folder cannot be moved over one that holds files.
        remove(folder)


@torch.no_grad()
def reconstruction_quality(folder: Path, videos: dict[str, list[Tensor]], device: torch.device) -> dict[str, float]:
    """Of a written VAE as it will be used, by size of the videos: mean and least PSNR; and the size of its weights.

    Also the mean and std of the normalised latents, which are near 0 and 1.
    """
    # Read back as others will, rounded weights and chunks of frames included.
    vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval()
    result = {"weights_mb": sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6}
    for size, clips in videos.items():
        values, encoded = [], []
        for clip in (as_input(clip, device) for clip in clips):
            encoded.append(latents.encode(vae, clip))
            values.append(psnr(latents.decode(vae, encoded[-1]), clip).item())
        encoded = torch.cat(encoded)
        result |= {f"psnr_{size}": sum(values) / len(values), f"least_psnr_{size}": min(values)}
        result |= {f"latents_mean_{size}": encoded.mean().item(), f"latents_std_{size}": encoded.std().item()}
    return result


def draw_reconstructions(pairs: list[tuple[Tensor, Tensor]], path: Path) -> None:
    """A row a video, (original, reconstruction) of (3, frames, height, width) in [-1, 1].

    Of its first, middle and last frame: the original, the reconstruction, and the strengthened difference.
    """
    rows = []
    for original, made in pairs[:VIDEOS]:
        # In a video's range, of which -1 is black.
        difference = (made.clamp(-1, 1) - original).abs() * DIFFERENCE - 1
        tiles = [to_frames(video) for video in (original, made, difference)]
        shown = np.linspace(0, original.shape[1] - 1, FRAMES).round().astype(int)
        rows.append(np.concatenate([tile[frame] for frame in shown for tile in tiles], axis=1))
    write_image(path, np.concatenate(rows))
