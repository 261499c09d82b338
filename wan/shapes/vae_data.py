"""What a VAE is trained on: clips cut from `shapes`, each batch a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nabla import InputError
from wan.shapes.dataset import Shapes
from wan.shapes.vae_settings import CutSettings, VaeSettings
from wan.training.data_workers import load_items

# Apart from those that train: seeds of videos for validation and for statistics.
VALIDATION_SEED, STATISTICS_SEED = 2**31, 2**31 + 1


class VideoBatch(NamedTuple):
    """videos: (B, 3, frames, height, width) uint8, rows last in memory as convolutions like them
    numbers: of the items of `Shapes` in the batches of all processes
    noise: the seed of what is drawn about their latents
    """

    videos: Tensor
    numbers: list[int]
    noise: int


class VideoPools:
    """The videos that clips are cut from, drawn once and kept where the training is, and the batches of its steps.

    Of a batch each of several processes cuts its own part. Raises `InputError` for batches that cannot be shared so.
    """

    def __init__(self, settings: VaeSettings, device: torch.device, rank: int = 0, processes: int = 1):
        self.settings, self.rank, self.processes = settings, rank, processes
        shares = np.array([cut.share for cut in settings.cuts])
        self.shares = shares / shares.sum()
        counts: dict[tuple[int, int], int] = {}
        for cut in settings.cuts:
            if cut.batch % processes:
                raise InputError(
                    f"a batch of {cut.batch} cannot be shared by {processes} processes; make it a multiple"
                )
            # Cuts from videos of one size share them.
            counts[cut.drawn] = max(cut.clips, counts.get(cut.drawn, 0))
        self.pools = {size: self._drawn(size, count, device) for size, count in counts.items()}

    def _drawn(self, size: tuple[int, int], count: int, device: torch.device) -> Tensor:
        """(count, frames, height, width, 3) uint8."""
        shapes = Shapes(self.settings.seed, count, size, self.settings.video_frames)
        # Filled video by video: to stack them would need twice the memory.
        pool = torch.empty(count, shapes.frames, *size[::-1], 3, dtype=torch.uint8, device=device)
        for place, video in zip(pool, load_items(Videos(shapes), range(count), self.settings.workers)):
            place.copy_(video[0].movedim(0, -1), non_blocking=True)
        return pool

    def batch(self, step: int) -> VideoBatch:
        """What this process takes of a step's clips, all of one cut."""
        # Every process draws the whole batch, and then takes its part: which clips a step sees does not depend on how
        # many processes there are.
        rng = np.random.default_rng((self.settings.seed, step))
        cut = self.settings.cuts[rng.choice(len(self.shares), p=self.shares)]
        pool = self.pools[cut.drawn]
        numbers = rng.integers(cut.clips, size=cut.batch).tolist()
        places = [_place(pool[0], cut, rng) for _ in numbers]
        own = range(self.rank, cut.batch, self.processes)
        videos = torch.stack([pool[numbers[n]][places[n]] for n in own])
        # The order in which losses are gathered: process by process.
        in_order = [numbers[n] for rank in range(self.processes) for n in range(rank, cut.batch, self.processes)]
        # Noise differs from process to process, else clips of two would share theirs.
        return VideoBatch(_channels_second(videos), in_order, int(rng.integers(2**62)) + self.rank)


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
        videos[name] = list(load_items(Videos(shapes), range(own.clips), min(settings.workers, own.clips)))
    return videos


def statistics_videos(settings: VaeSettings) -> Iterator[Tensor]:
    """Training videos that steps do not see."""
    count = settings.statistics_clips
    shapes = Shapes(STATISTICS_SEED, count, settings.validation.sizes[0], settings.video_frames)
    return load_items(Videos(shapes), range(count), settings.workers)


def as_input(videos: Tensor, device: torch.device) -> Tensor:
    """uint8 -> float32 in [-1, 1] on a device."""
    return videos.to(device, non_blocking=True).float() / 127.5 - 1


def _place(video: Tensor, cut: CutSettings, rng: np.random.Generator) -> tuple[slice, ...]:
    """A random place and time of a cut in (frames, height, width, 3) of a whole video."""
    parts = (cut.frames, *cut.size[::-1])
    firsts = [int(rng.integers(whole - part + 1)) for whole, part in zip(video.shape, parts)]
    return tuple(slice(first, first + part) for first, part in zip(firsts, parts))


def _channels_second(videos: Tensor) -> Tensor:
    """(B, frames, height, width, 3) -> (B, 3, frames, height, width), a view in the order of channels_last_3d."""
    return videos.movedim(-1, 1)
