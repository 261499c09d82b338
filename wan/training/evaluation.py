"""Looking at a transformer in training: its loss on fixed noise, and videos that it makes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from wan.config.settings import VideoSettings, changed
from wan.files.video import make_folder, to_frames, write_image, write_video
from wan.models.checkpoint import Checkpoint
from wan.models.training import Texts, TrainingSpec, join_texts
from wan.run.jobs import words_of
from wan.sampling.loop import Conditions, denoise
from wan.sampling.solvers import TRAIN_TIMESTEPS, make_solver
from wan.training.clips import Clips
from wan.training.config import ResolvedSamples
from wan.training.data import LatentBatch, validation_batch
from wan.training.encoder import Encoder
from wan.training.objective import add_noise, mse_per_clip, predict_velocity
from wan.training.objective_settings import ObjectiveSettings
from wan.training.shutdown import Diverged
from wan.training.write_errors import collective_write

log = logging.getLogger("wan")


def validation_losses(
    transformer: nn.Module,
    clips: Clips,
    count: int,
    micro_batch: int,
    objective: ObjectiveSettings,
    accelerator: Accelerator,
    step: int,
) -> dict[str, float]:
    """The flow-matching loss over the first `count` clips, each with its own fixed noise and noise level.

    With attention "dense", and also "sparse" where the transformer's is. Clips of one size are taken together, at most
    `micro_batch` by a process. Raises `Diverged`, with the step after which this is, naming clips whose loss is not
    finite.
    """
    applied = transformer.nabla
    variants = {"dense": True} | ({"sparse": False} if applied.sparse else {})
    count = min(count, len(clips))
    # A row a variant, a column a clip. Each process fills its own columns, each column is one process's, and the sum
    # over processes has them all.
    losses = torch.zeros(len(variants), count, device=accelerator.device)
    # Of the first `count` clips, those of one size: a batch is one tensor.
    alike = [[number for number in bucket if number < count] for bucket in clips.buckets.values()]
    for numbers in filter(None, alike):
        for own, counted in rank_batches(numbers, micro_batch, accelerator.process_index, accelerator.num_processes):
            singles = [validation_batch(clips, objective, number, count) for number in own]
            batch = LatentBatch.joined(torch.cat, singles).to(accelerator.device)
            latents = add_noise(batch.latents, batch.noise, batch.sigmas)
            for n, switched_off in enumerate(variants.values()):
                # The same noise by dense attention and by sparse, so that their losses differ by the attention alone.
                applied.switched_off = switched_off
                prediction = predict_velocity(transformer, latents, batch.sigmas, batch.text)
                losses[n, own[:counted]] = mse_per_clip(prediction, batch.noise - batch.latents, batch.sigmas)[:counted]
    applied.switched_off = False
    of_all = dict(zip(variants, accelerator.reduce(losses).cpu()))
    _check_finite(of_all, clips, objective, step)
    return {name: own.mean().item() for name, own in of_all.items()}


def _check_finite(losses: dict[str, Tensor], clips: Clips, objective: ObjectiveSettings, step: int) -> None:
    """Raise `Diverged` unless the losses of each variant, (clips,), are finite."""
    bad = []
    for name, own in losses.items():
        for number in (~own.isfinite()).nonzero().flatten().tolist():
            sigma = validation_batch(clips, objective, number, len(own)).sigmas.max()
            bad.append(f"{name} {own[number]} at timestep {TRAIN_TIMESTEPS * sigma:.1f} of {clips.describe(number)}")
    if bad:
        raise Diverged(f"after step {step}: the validation loss is not finite: {'; '.join(bad)}")


def rank_batches(numbers: list[int], most: int, rank: int, processes: int) -> list[tuple[list[int], int]]:
    """Batches that the process `rank` takes of numbers that all share: at most `most` in each, and how many count.

    All are equally large, as compiled blocks need, and every process has as many, as sharded weights need; so the last
    number is repeated where there are too few, uncounted.
    """
    # Of 10 numbers, at most 4 in a batch, two processes take 2 rounds of 3: the first 0 1 2 and 6 7 8, the second 3 4 5
    # and 9 9 9, of which one counts.
    rounds = -(-len(numbers) // (most * processes))
    size = -(-len(numbers) // (rounds * processes))
    parts = [numbers[first : first + size] for first in range(rank * size, rounds * processes * size, processes * size)]
    return [(part + numbers[-1:] * (size - len(part)), len(part)) for part in parts]


class Guide(NamedTuple):
    """A sample video, and what guides it in both branches, as the transformer takes it."""

    prompt: Texts
    negative: Texts
    video: VideoSettings


class Sampler:
    """Makes the sample videos of a run: the same sentences every time, each with a noise of its own.

    guides: one for each prompt
    """

    def __init__(self, settings: ResolvedSamples, training: TrainingSpec, vae: nn.Module, guides: list[Guide]):
        self.settings, self.training, self.vae, self.guides = settings, training, vae, guides

    @torch.no_grad()
    def write(self, transformer: nn.Module, folder: Path, accelerator: Accelerator) -> None:
        """Write a video a prompt into a folder. All processes walk, as sharded weights need; the first one decodes."""
        sampling, device = self.settings.sampling, accelerator.device
        for number, (prompt, guide) in enumerate(zip(self.settings.prompts, self.guides)):
            latents = denoise(
                partial(self.training.velocity, transformer),
                self.training.draw_noise(transformer, guide.video, sampling.seed + number, device),
                Conditions(_alone(guide.prompt, device), _alone(guide.negative, device)),
                make_solver(sampling.solver, sampling.steps, sampling.shift, device),
                sampling.guide_scale_of(0),
                before_step=partial(transformer.nabla.steps.set_step, steps=sampling.steps),
            )
            # Else the forwards of training would go on as those of the last step.
            transformer.nabla.steps.set_step(None)
            name = folder / f"{number:02d}-{words_of(prompt)}"
            with collective_write(accelerator, name):
                if accelerator.is_main_process:
                    self._write(name, latents, guide.video)

    def _write(self, name: Path, latents: Tensor, video: VideoSettings) -> None:
        """Decode latents (1, C, T, h, w) into a file of that name and an ending of its own."""
        make_folder(name.parent)
        # The VAE is float32, and this is called within the transformer's autocast.
        with torch.autocast(latents.device.type, enabled=False):
            frames = to_frames(self.training.decode(self.vae, latents)[0])
        if video.frame_num == 1:
            write_image(name.with_suffix(".png"), frames[0])
        else:
            write_video(name.with_suffix(".mp4"), frames, video.fps)


def _alone(text: Texts, device: torch.device) -> Texts:
    """A batch of one prompt, on a device."""
    return join_texts(lambda own: own[0][None].to(device), [text])


def build_sampler(
    samples: ResolvedSamples,
    base: Checkpoint,
    transformer: nn.Module,
    clips: Clips,
    device: torch.device,
) -> Sampler:
    """The sampler of prompts, which are encoded as the clips were; raises `InputError` for too large a video.

    Where more than text stands beside the noise each prompt has that of a clip, and so its size and length.
    """
    training = clips.training
    samples.video.check_positions(training.takes(transformer.config).positions)
    encoder = Encoder(base, device)
    for note in encoder.cut_notes([samples.sampling.negative_prompt, *samples.prompts]):
        log.info("warning: samples: %s", note)
    # The text encoder goes when `encoder` does: the sampler keeps states and the VAE.
    negative, *texts = [encoder.text([one])[0] for one in (samples.sampling.negative_prompt, *samples.prompts)]
    guides = []
    for number, text in enumerate(texts):
        own, video = number % len(clips), samples.video
        beside = clips.beside(own)
        if beside:
            size = clips.clips[own].size
            video = changed(video, size=base.geometry.size_of(size), frame_num=base.geometry.frames_of(size[0]))
        guides.append(Guide(clips.ready(text | beside), clips.ready(negative | beside), video))
    return Sampler(samples, training, encoder.vae, guides)


@contextmanager
def ema_weights(weights: list[Tensor], ema: EMAModel | None) -> Iterator[None]:
    """The moving averages in place of the weights, which come back afterwards; needs memory for one tensor more."""
    if ema is not None:
        _swap(weights, ema.shadow_params)
    try:
        yield
    finally:
        if ema is not None:
            _swap(weights, ema.shadow_params)


@torch.no_grad()
def _swap(weights: list[Tensor], others: list[Tensor]) -> None:
    """Exchange the values of tensors in place: optimizers, hooks and compiled graphs go on holding the same ones."""
    for weight, other in zip(weights, others):
        kept = weight.detach().clone()
        weight.copy_(other)
        other.copy_(kept)
