"""Training of a small VAE on `shapes`, from settings to a folder that diffusers loads; goes on where it was cut."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel
from torch import Tensor

from nabla import InputError
from wan.config.config_files import read_settings
from wan.files.atomic import atomic_path, lock_folder
from wan.memory.estimates import GIB
from wan.memory.peak import peak_bytes
from wan.models.wan.whole_clips import posterior, reconstruction, take_whole_clips
from wan.shapes.vae_data import VideoBatch, VideoPools, as_input, statistics_videos, validation_videos
from wan.shapes.vae_export import draw_reconstructions, export_vae, latent_statistics, reconstruction_quality
from wan.shapes.vae_model import Autoencoder, new_vae, psnr, trained_vae, vae_loss
from wan.shapes.vae_settings import CHANGEABLE, VaeSettings
from wan.training.evaluation import ema_weights
from wan.training.loop import TrainingLoop
from wan.training.metrics import Metrics
from wan.training.models import build_optimizers
from wan.training.schema import check_continues
from wan.training.shutdown import Diverged, release_accelerator
from wan.training.state_file import check_step, load_state, save_state
from wan.training.write_errors import collective_write

log = logging.getLogger("wan")

SETTINGS_FILE, STATE_FILE, PICTURE_FILE, RESULT_FOLDER = "settings.yaml", "state.pt", "reconstructions.png", "vae"


class VaeTrainer(TrainingLoop):
    """One run in the folder `settings.out`, from its last state if it has one, by one process or several.

    Raises `InputError` for settings that cannot continue what is there.
    """

    def __init__(self, settings: VaeSettings):
        # Not by steps: states are written after so many seconds, by the first process alone.
        super().__init__(settings.steps, save_every=None)
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
        self.settings, self.device = settings, self.accelerator.device
        self.is_leader = self.accelerator.is_main_process
        log.setLevel(logging.INFO if self.is_leader else logging.WARNING)
        self.folder = Path(settings.out).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.folder) if self.is_leader else None
        except OSError as error:
            raise InputError(f"out {settings.out} cannot be written ({error.strerror}); choose another") from None
        self._build()
        if (self.folder / STATE_FILE).is_file():
            earlier = VaeSettings.from_dict(read_settings(self.folder / SETTINGS_FILE))
            check_continues(settings, earlier, CHANGEABLE)
            load_state(self.folder / STATE_FILE, self.device, self._take)
            log.info("going on after step %d", self.step)
        self.held_out: dict[str, list[Tensor]] = {}

    def close(self) -> None:
        """Let go of what processes share; nothing is trained afterwards."""
        self.model = None
        if self.lock is not None:
            self.lock.close()
        release_accelerator(self.accelerator)

    def _build(self) -> None:
        settings = self.settings
        vae = (
            new_vae(settings.vae, settings.seed)
            if settings.start is None
            else trained_vae(settings.start, settings.vae)
        )
        self.vae = vae.to(self.device)
        # From here on only `posterior` and `reconstruction` give what this VAE makes of a clip.
        take_whole_clips(self.vae)
        if settings.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.weights = [weight for weight in self.vae.parameters() if weight.requires_grad]
        self.autoencoder = Autoencoder(self.vae)
        # Before DDP wraps the module, so that its exchange of gradients stays out of the graph.
        if settings.compile:
            self.autoencoder.forward = torch.compile(self.autoencoder.forward, dynamic=False)
        self.model = self.accelerator.prepare_model(self.autoencoder)
        convolutions = [weight for weight in self.weights if is_convolution(weight)]
        self.optimizers, self.schedules = build_optimizers(
            settings.optimizer, settings.steps, self.weights, convolutions, settings.matrix_lr
        )
        self.ema = EMAModel(self.weights, decay=settings.ema, foreach=True)

    def run(self, minutes: float = math.inf) -> bool:
        """Train for so long at most, and write the result after the last step; whether that was reached.

        Raises `Diverged`, or `Stopped` after SIGTERM. A run that is finished writes its result anew.
        """
        if not minutes >= 0:
            raise InputError(f"minutes {minutes} is not a number of at least 0")
        self.deadline = time.monotonic() + 60 * minutes
        with collective_write(self.accelerator, self.folder):
            if self.is_leader:
                with atomic_path(self.folder / SETTINGS_FILE) as partial:
                    partial.write_text(yaml.safe_dump(self.settings.to_dict(), sort_keys=False))
                self.metrics = Metrics(self.folder, self.step)
                self.held_out = validation_videos(self.settings)
        with self.signal:
            # Also before the first step: where time is up at once, none is taken, and all processes have to see it so.
            self.stops = self._agree(time.monotonic() >= self.deadline)
            self.first_step = self.step
            self._train(self._batches())
        if self.signal.asked:
            raise self._stopped()
        if self.step < self.steps:
            log.info("time is up after step %d of %d; start again to go on", self.step, self.steps)
            return False
        with collective_write(self.accelerator, self.folder / RESULT_FOLDER):
            if self.is_leader:
                self._finish()
        return True

    def _batches(self) -> Iterator[VideoBatch]:
        # Drawn here, which takes long, only once there is a first step to take.
        pools = VideoPools(self.settings, self.device, self.accelerator.process_index, self.accelerator.num_processes)
        self.saved = time.monotonic()
        for step in range(self.step, self.steps):
            yield pools.batch(step)

    def _evaluate(self) -> dict[str, float]:
        # The first process alone; the others wait for it in the next step's exchange.
        if self.is_leader and self.step % self.settings.validation.every == 0:
            with self._deferred():
                return self._validate()
        return {}

    def _log_line(self, row: dict[str, Any]) -> str | None:
        is_due = self.step % self.settings.log_steps == 0 or self.step == self.first_step + 1 or "psnr" in row
        return ", ".join(f"{key} {value:.4g}" for key, value in row.items()) if is_due else None

    def _after_step(self) -> None:
        """A state on the way, when it is due."""
        is_due = time.monotonic() - self.saved > self.settings.checkpoint_seconds
        if not self.is_leader or not is_due or self.unwritten is not None:
            return
        with self._deferred():
            save_state(self._state(), self.folder / STATE_FILE)
        self.saved = time.monotonic()

    def _agree(self, stops: bool) -> bool:
        """Whether any of the processes wants to stop."""
        return self.accelerator.gather(torch.tensor([float(stops)], device=self.device)).any().item()

    def _step(self, batches: Iterator[VideoBatch]) -> dict[str, float]:
        clips = next(batches)
        start, settings = time.perf_counter(), self.settings
        video = as_input(clips.videos, self.device)
        dtype = getattr(torch, settings.precision)
        # The loss is outside: `posterior` and `reconstruction` give float32.
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            made, parameters = self.model(video, self.autoencoder.noise_for(video, clips.noise))
        latents = DiagonalGaussianDistribution(parameters)
        losses = vae_loss(made, video, latents, settings.loss)
        losses.mean().backward()
        # DDP has averaged gradients over processes in the backward, so the norm is the same in all.
        norm = torch.nn.utils.clip_grad_norm_(self.weights, settings.optimizer.clip)
        lr = self.schedules[-1].get_last_lr()[0]
        for part in (*self.optimizers, *self.schedules):
            part.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.ema.step(self.weights)
        seen = self._seen(losses.detach(), norm, made.detach(), video, latents, clips.numbers)
        self.step += 1
        seconds = time.perf_counter() - start
        row = {"step": self.step} | seen | {"lr": lr, "seconds": seconds, "clips_per_s": len(clips.numbers) / seconds}
        pixels = len(clips.numbers) * video[0, 0].numel()
        return row | {"pixels_per_s": pixels / seconds, "memory_gib": peak_bytes(self.device) / GIB}

    @torch.no_grad()
    def _seen(
        self,
        losses: Tensor,
        norm: Tensor,
        made: Tensor,
        video: Tensor,
        latents: DiagonalGaussianDistribution,
        numbers: list[int],
    ) -> dict[str, float]:
        """What a row says of a step's losses and latents, over all processes; raises `Diverged`.

        The only wait for the GPU, once it has all of the step to do: a run that diverged ends before it is saved.
        """
        names = ("train_psnr", "kl", "noise", "grad_norm")
        values = psnr(made, video).mean(), latents.kl().sum() / latents.mean.numel(), latents.std.mean(), norm
        own = torch.cat((losses, torch.stack((*values, losses.new_full((), self._asks_to_stop)))))
        # A row a process: the losses of its clips, then the means and whether it asks to stop.
        every = self.accelerator.gather(own[None])
        losses, means = every[:, : len(losses)].flatten(), every[:, len(losses) :].mean(0).tolist()
        # A mean of 0 and 1: above 0 if any asks.
        self.stops = means.pop() > 0
        row = {"loss": losses.mean().item()} | dict(zip(names, means))
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            bad = ", ".join(f"{value} at item {number}" for value, number in zip(losses.tolist(), numbers))
            raise Diverged(
                f"step {self.step + 1}: the loss or its gradient (norm {row['grad_norm']}) is not finite: {bad} of "
                f"Shapes with seed {self.settings.seed}; the last state in {self.folder} is from before"
            )
        return row

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """PSNR of the averaged weights, in float32, by size of the videos; `psnr` is that of the first size."""
        row, pairs = {}, {}
        with ema_weights(self.weights, self.ema):
            for size, videos in self.held_out.items():
                # Latents without noise, as the VAE is used.
                originals = [as_input(video, self.device) for video in videos]
                made = [reconstruction(self.vae, posterior(self.vae, video).mode()) for video in originals]
                row[f"psnr_{size}"] = torch.cat([psnr(*both) for both in zip(made, originals)]).mean().item()
                pairs[size] = [(video[0], again[0]) for video, again in zip(originals, made)]
        first = next(iter(pairs))
        draw_reconstructions(pairs[first], self.folder / PICTURE_FILE)
        return {"psnr": row[f"psnr_{first}"]} | row

    @torch.no_grad()
    def _finish(self) -> None:
        """Write the averaged weights with the latents' statistics, and say how good what was written is."""
        folder = self.folder / RESULT_FOLDER
        with ema_weights(self.weights, self.ema):
            # Statistics of the averaged weights, which are those that are written.
            export_vae(self.vae, *self._statistics(), getattr(torch, self.settings.dtype), folder)
        result = reconstruction_quality(folder, self.held_out, self.device)
        log.info("%s: %s", folder, ", ".join(f"{key} {value:.2f}" for key, value in result.items()))
        self.metrics.write({"step": self.step} | result)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents' channels; of an encoder that stayed, those that it had."""
        if self.settings.decoder_only:
            own = self.vae.config
            return torch.tensor(own.latents_mean), torch.tensor(own.latents_std)
        with contextlib.closing(statistics_videos(self.settings)) as videos:
            return latent_statistics(self.vae, (as_input(video, self.device) for video in videos))

    def _save(self) -> None:
        with collective_write(self.accelerator, self.folder):
            if self.unwritten is not None:
                raise self.unwritten
            if self.is_leader:
                save_state(self._state(), self.folder / STATE_FILE)

    def _state(self) -> dict[str, Any]:
        stateful = {"vae": self.vae, "ema": self.ema}
        state = {name: part.state_dict() for name, part in stateful.items()} | {"step": self.step}
        return state | {"optimizers": [part.state_dict() for part in (*self.optimizers, *self.schedules)]}

    def _take(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.ema.load_state_dict(state["ema"])
        for part, own in zip((*self.optimizers, *self.schedules), state["optimizers"], strict=True):
            part.load_state_dict(own)
        self.step = check_step(state, self.steps)


def is_convolution(weight: Tensor) -> bool:
    """Whether a parameter is the weight of a convolution, rather than a bias or the gain of a norm."""
    return weight.ndim > 3 and weight[0].numel() > 1
