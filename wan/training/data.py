"""Batches of prepared clips: which clips, noise and noise levels a step sees is a function of seed and step alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nabla import InputError
from wan.models.training import Texts, join_texts
from wan.sampling.solvers import TRAIN_TIMESTEPS
from wan.training.clips import Clips
from wan.training.data_workers import load_items
from wan.training.objective import frame_levels, sigmas_from_quantiles
from wan.training.objective_settings import ObjectiveSettings

# Streams of random numbers of one seed that must not meet.
ORDER, BUCKET, DRAW, VALIDATION, FIRST_FRAME = range(5)


class LatentBatch(NamedTuple):
    """latents, noise: (B, C, T, h, w) float32; sigmas: (B,) float32, or (B, T) where some clips' first frames are given
    and so without noise; text: as the model takes captions.
    """

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    text: Texts

    @classmethod
    def joined(cls, join: Callable[[list[Tensor]], Tensor], rows: Sequence[tuple[Any, ...]]) -> LatentBatch:
        """A batch of clips by `torch.stack`, or of batches by `torch.cat`."""
        return cls(*(join_texts(join, column) for column in zip(*rows)))

    def to(self, device: torch.device) -> LatentBatch:
        return LatentBatch.joined(lambda own: own[0].to(device, non_blocking=True), [self])


class Draw(NamedTuple):
    """What is random about a clip in a batch."""

    sigma: Tensor
    drops_caption: bool
    gives_first_frame: bool
    generator: torch.Generator


class MicroBatches(Dataset):
    """The micro-batches of one process, by number; those of a step together with other processes' make its batch.

    A batch is of clips of one size. Sizes are drawn as often as they have clips, and each gives its clips in an order
    that is drawn anew whenever all have been seen. What a batch holds does not depend on how it is divided.
    """

    def __init__(
        self,
        clips: Clips,
        objective: ObjectiveSettings,
        seed: int,
        batch_size: int,
        micro_batch: int,
        rank: int = 0,
        processes: int = 1,
    ):
        if batch_size % (micro_batch * processes):
            raise InputError(
                f"batch_size {batch_size} is not a multiple of micro_batch {micro_batch} x {processes} processes"
            )
        self.clips, self.objective, self.seed = clips, objective, seed
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.rank, self.processes = rank, processes
        self.accumulation_steps = batch_size // (micro_batch * processes)
        self.bucket_numbers = list(clips.buckets.values())
        # Upper bounds of the buckets' parts of [0, 1].
        self.shares = np.cumsum([len(bucket) for bucket in self.bucket_numbers]) / len(clips)
        # The bucket of each step, as far as they have been asked for.
        self.chosen = np.empty(0, dtype=np.int64)

    def numbers(self, step: int) -> list[int]:
        """The clips of the whole batch of a step."""
        self._choose_buckets(step + 1)
        which = self.chosen[step]
        bucket = self.bucket_numbers[which]
        # How many of the bucket's clips earlier steps took; past the end of one order, the next epoch's goes on.
        first = int((self.chosen[:step] == which).sum()) * self.batch_size
        places = (divmod(n, len(bucket)) for n in range(first, first + self.batch_size))
        return [bucket[_order(self.seed, which, epoch, len(bucket))[place]] for epoch, place in places]

    def draw(self, step: int, place: int) -> Draw:
        """What is random about the clip at a place of a step's batch; its generator gives the noise next."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, DRAW, step, place))
        # Before the noise, so that a clip's level can be told without it. Kept away from 0 and 1, where a normal
        # distribution's quantiles are infinite.
        quantile, chance = torch.rand(2, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        sigma = sigmas_from_quantiles(quantile, self.objective)
        # By numbers of its own: all else is drawn as it is without.
        chance_of_first = np.random.default_rng((self.seed, FIRST_FRAME, step, place)).random()
        gives_first = chance_of_first < self.objective.first_frame
        return Draw(sigma, chance.item() < self.objective.text_dropout, gives_first, generator)

    def describe(self, step: int, place: int) -> str:
        """The clip at a place of a step's batch and its noise level, in words."""
        timestep = TRAIN_TIMESTEPS * self.draw(step, place).sigma
        return f"at timestep {timestep:.1f} of {self.clips.describe(self.numbers(step)[place])}"

    def __getitem__(self, number: int) -> LatentBatch:
        # The places of a batch go by micro-batch, and within it by process; `Trainer._gather` puts losses so.
        step, part = divmod(number, self.accumulation_steps)
        first = (part * self.processes + self.rank) * self.micro_batch
        numbers = self.numbers(step)
        rows = []
        for place in range(first, first + self.micro_batch):
            sigma, drops_caption, gives_first, generator = self.draw(step, place)
            latents, text = self.clips.load(numbers[place], drops_caption)
            # On the CPU, whose numbers are the same for every device and number of workers.
            noise = torch.randn(latents.shape, generator=generator)
            sigmas = levels_of(self.objective, sigma, latents, gives_first)
            rows.append((latents, noise, sigmas, text))
        return LatentBatch.joined(torch.stack, rows)

    def load(self, first_step: int, last_step: int, workers: int) -> Generator[LatentBatch, None, None]:
        """The micro-batches of steps `first_step` to before `last_step`, in order."""
        numbers = range(first_step * self.accumulation_steps, last_step * self.accumulation_steps)
        return load_items(self, numbers, workers)

    def _choose_buckets(self, steps: int) -> None:
        if len(self.chosen) < steps:
            # Generously, so that this is done rarely; a longer series begins with the shorter one.
            drawn = np.random.default_rng((self.seed, BUCKET)).random(2 * steps)
            # Clipped, since rounding may leave the last bound below 1.
            self.chosen = np.searchsorted(self.shares, drawn, side="right").clip(max=len(self.shares) - 1)


def validation_batch(clips: Clips, objective: ObjectiveSettings, number: int, count: int) -> LatentBatch:
    """The batch of one clip, `number` of `count`, for validation: always with the same noise at the same level.

    The levels of all are spread evenly over the distribution that training draws from, and so are those whose first
    frame is given over all.
    """
    latents, text = clips.load(number)
    generator = torch.Generator().manual_seed(seed_of(VALIDATION, number))
    noise = torch.randn(latents.shape, generator=generator)
    quantile = torch.tensor((number + 0.5) / count, dtype=torch.float64)
    gives_first = int((number + 1) * objective.first_frame) > int(number * objective.first_frame)
    sigmas = levels_of(objective, sigmas_from_quantiles(quantile, objective), latents, gives_first)
    return LatentBatch.joined(torch.stack, [(latents, noise, sigmas, text)])


def levels_of(objective: ObjectiveSettings, sigma: Tensor, latents: Tensor, gives_first: bool) -> Tensor:
    """The noise level () of a clip's latents (C, T, h, w), or its frames' (T,) where the first may be given.

    Of a single frame nothing would be left to learn, so it never is.
    """
    frames = latents.shape[1]
    # Either in all batches of a run: blocks are compiled for one of the two.
    return frame_levels(sigma, frames, gives_first and frames > 1) if objective.first_frame else sigma


def seed_of(*numbers: int) -> int:
    """A seed for torch of whole numbers, unlike that of any others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@functools.lru_cache(16)
def _order(seed: int, bucket: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, ORDER, int(bucket), epoch)).permutation(count)
