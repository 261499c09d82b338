"""What a VAE is trained on: clips cut from `shapes`, each batch a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from wan.training.reading import read
from wan.training.shapes import Shapes
from wan.training.vae_settings import CutSettings, VaeSettings

# Apart from those that train: seeds of videos for validation and for statistics.
VALIDATION_SEED, STATISTICS_SEED = 2**31, 2**31 + 1
ALL = 2**62


class Batch(NamedTuple):
    """videos: (B, 3, frames, height, width) uint8, rows last in memory as convolutions like them
    numbers: of the items of `Shapes`; noise: the seed of what is drawn about their latents
    """

    videos: Tensor
    numbers: list[int]
    noise: int


class Batches(Dataset):
    """The batches of a run, by step."""

    def __init__(self, settings: VaeSettings):
        self.settings = settings
        shares = np.array([cut.share for cut in settings.cuts])
        self.shares = shares / shares.sum()
        self.most = max(cut.batch for cut in settings.cuts)

    def __getitem__(self, step: int) -> Batch:
        settings = self.settings
        rng = np.random.default_rng((settings.seed, step))
        cut = settings.cuts[rng.choice(len(self.shares), p=self.shares)]
        shapes = Shapes(settings.seed, ALL, cut.drawn, settings.video_frames)
        numbers = [step * self.most + place for place in range(cut.batch)]
        videos = torch.stack([_cut(shapes[number][0], cut, rng) for number in numbers])
        return Batch(_channels_second(videos), numbers, int(rng.integers(2**62)))

    def load(self, first_step: int) -> Iterator[Batch]:
        """The batches from `first_step` on, in order."""
        return read(self, range(first_step, self.settings.steps), self.settings.workers)


class Videos(Dataset):
    """Whole videos of `Shapes`, (1, 3, frames, height, width) uint8 each."""

    def __init__(self, shapes: Shapes):
        self.shapes = shapes

    def __getitem__(self, number: int) -> Tensor:
        return _channels_second(self.shapes[number][0][None])


def validation_videos(settings: VaeSettings) -> dict[str, list[Tensor]]:
    """Held-out videos, the same for every run, by size as `width*height`."""
    own = settings.validation
    videos = {}
    for size in own.sizes:
        shapes = Shapes(VALIDATION_SEED, own.clips, size, settings.video_frames, split="held_out")
        name = "*".join(map(str, size))
        videos[name] = list(read(Videos(shapes), range(own.clips), min(settings.workers, own.clips)))
    return videos


def statistics_videos(settings: VaeSettings) -> Iterator[Tensor]:
    """Training videos that steps do not see."""
    count = settings.statistics_clips
    shapes = Shapes(STATISTICS_SEED, count, settings.validation.sizes[0], settings.video_frames)
    return read(Videos(shapes), range(count), settings.workers)


def as_input(videos: Tensor, device: torch.device) -> Tensor:
    """uint8 -> float32 in [-1, 1] on a device."""
    return videos.to(device, non_blocking=True).float() / 127.5 - 1


def _cut(video: Tensor, cut: CutSettings, rng: np.random.Generator) -> Tensor:
    """(frames, height, width, 3) of a whole video, at a random place and time."""
    parts = (cut.frames, *cut.size[::-1])
    firsts = (int(rng.integers(whole - part + 1)) for whole, part in zip(video.shape, parts))
    return video[tuple(slice(first, first + part) for first, part in zip(firsts, parts))]


def _channels_second(videos: Tensor) -> Tensor:
    """(B, frames, height, width, 3) -> (B, 3, frames, height, width), a view in the order of channels_last_3d."""
    return videos.movedim(-1, 1)
