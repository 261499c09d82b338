"""A training run: from settings to checkpoints, over one process or several, from the last checkpoint on."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nabla import InputError
from wan.attention.compile import check_compiler, many_compiles
from wan.files.video import check_encoder
from wan.memory.estimates import GIB
from wan.memory.peak import peak_bytes
from wan.training.accelerator import build_accelerator
from wan.training.checkpoints import CheckpointManager, TrainState
from wan.training.clips import Clips
from wan.training.config import TrainingSettings
from wan.training.data import LatentBatch, MicroBatches
from wan.training.evaluation import build_sampler, ema_weights, validation_losses
from wan.training.export import full_state_dict, provide_components, write_weights
from wan.training.loop import TrainingLoop
from wan.training.metrics import Metrics, speed
from wan.training.models import (
    build_optimizers,
    build_student,
    build_teacher,
    matrix_parameters,
    no_gradient_sync,
    open_components,
    sampled_as,
    settle,
    warn_of_another_attention,
)
from wan.training.objective import add_noise, mse_per_clip, predict_velocity
from wan.training.run_manifest import check_manifest, run_inputs, write_manifest
from wan.training.shutdown import Diverged, release_accelerator
from wan.training.write_errors import collective_write

log = logging.getLogger("wan")


class Trainer(TrainingLoop):
    """One run. `run` trains from the last whole checkpoint in the folder `settings.out`, or from the start.

    Raises `InputError` for data, checkpoints and settings that do not fit each other or what is in the folder.
    """

    def __init__(self, settings: TrainingSettings):
        super().__init__(settings.steps, settings.every.checkpoint)
        self.accelerator = build_accelerator()
        self.device = self.accelerator.device
        # Lines of progress are the same in every process, so the first alone tells them.
        log.setLevel(logging.INFO if self.accelerator.is_main_process else logging.WARNING)
        if settings.shard and self.accelerator.num_processes == 1:
            raise InputError("shard spreads weights over processes, and here is one; leave it out")
        self.folder = Path(settings.out).expanduser().resolve()
        if settings.compile:
            check_compiler(self.device)
        self.base = open_components(settings.checkpoint, settings.transformer, settings.components)
        self.settings, self.facts = settings, _ = settle(settings, self.base)
        samples = None if settings.samples is None else settings.samples.over(sampled_as(self.base), self.base.geometry)
        # What the videos on the way will need is looked for now, rather than after an hour.
        if samples is not None and samples.prompts and samples.video.frame_num > 1:
            check_encoder()
        if self.accelerator.is_main_process:
            warn_of_another_attention(self.base, settings.attention)
        self.clips = Clips(settings.data.train, self.base.text_length)
        held_out = settings.data.validation
        self.validation = None if held_out is None else Clips([held_out], self.base.text_length, self.clips)
        self.clips.check_made_for(self.base, self.facts)
        self.batches = MicroBatches(
            self.clips,
            settings.objective,
            settings.seed,
            settings.batch_size,
            settings.micro_batch,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        # Takes the run's folder before weights are loaded, so that a second run in it is refused at once.
        self.checkpoints = CheckpointManager(self.folder, settings.keep_last, self.accelerator)
        self._build_models()
        for clips in filter(None, (self.clips, self.validation)):
            clips.check_fit(self.transformer.config, self.base.geometry)
        self.inputs = run_inputs(settings, self.base, self.clips, self.validation)
        # After `_build_models`: a state is read in place, into weights and optimizers that are sharded already.
        last = self.checkpoints.last()
        if last is not None:
            check_manifest(self.folder, settings, self.inputs)
            self.state.load(last)
            self.step = self.state.step
            log.info("going on from %s", last)
        self.sampler = None
        if samples is not None and samples.prompts:
            shown = self.validation or self.clips
            self.sampler = build_sampler(samples, self.base, self.transformer, shown, self.device)

    def close(self) -> None:
        """Let go of what processes share; nothing is trained afterwards."""
        # DDP's wrapper has to be gone before the group of processes ends, see `release_accelerator`.
        self.model = None
        self.checkpoints.close()
        release_accelerator(self.accelerator)

    def _build_models(self) -> None:
        settings, processes = self.settings, self.accelerator.num_processes
        mesh = init_device_mesh(self.device.type, (processes,)) if settings.shard else None
        self.transformer = build_student(settings, self.base, self.device, mesh)
        self.teacher = None
        if settings.mode == "distill":
            self.teacher = build_teacher(settings, self.base, self.device, mesh)
        # `model` is what losses go through, since DDP exchanges gradients in its wrapper's backward. All else uses
        # `transformer`, whose parameters are the same tensors.
        self.model = self.transformer if mesh else self.accelerator.prepare_model(self.transformer)
        # Listed after sharding, which puts other parameters, DTensors, in the place of those that were loaded.
        self.weights = [weight for weight in self.transformer.parameters() if weight.requires_grad]
        optimizers, schedules = build_optimizers(
            settings.optimizer, settings.steps, self.weights, matrix_parameters(self.transformer), settings.matrix_lr
        )
        ema = None if settings.ema is None else EMAModel(self.weights, decay=settings.ema, foreach=True)
        self.state = TrainState(self.transformer, optimizers, schedules, ema)

    def run(self) -> None:
        """Train to the last step. Raises `Diverged`, or `Stopped` after SIGTERM."""
        settings = self.settings
        if self.step >= settings.steps:
            log.info("all %d steps are done: %s", self.step, self.checkpoints.last())
            return
        # Anew at every start: settings that may change, and a metrics file without rows after the step that is gone on
        # from.
        with collective_write(self.accelerator, self.folder):
            if self.accelerator.is_main_process:
                write_manifest(self.folder, settings, self.inputs)
                provide_components(self.base, self.facts.parts, self.folder / "parts", anew=self.step == 0)
                self.metrics = Metrics(self.folder, self.step)
        batches = self.batches.load(self.step, settings.steps, settings.workers)
        with self.signal, many_compiles(), contextlib.closing(batches):
            # A row of what the run starts from, to compare later ones with.
            if self.step == 0 and self.validation is not None:
                self._write({"step": 0} | self._validate())
            self._train(batches)
        if self.step < settings.steps:
            raise self._stopped()

    def _step(self, batches: Iterator[LatentBatch]) -> dict[str, Any]:
        start, settings = time.perf_counter(), self.settings
        losses, waited = [], 0.0
        for part in range(self.batches.accumulation_steps):
            before = time.perf_counter()
            batch = next(batches).to(self.device)
            waited += time.perf_counter() - before
            with contextlib.ExitStack() as stack:
                # Gradients are exchanged once a step, in the backward of its last micro-batch.
                if part < self.batches.accumulation_steps - 1:
                    stack.enter_context(no_gradient_sync(self.model, self.accelerator))
                losses.append(self._losses(batch))
                # Micro-batches are equally large, and DDP and FSDP average over processes, so this adds up to the
                # batch's mean.
                (losses[-1].mean() / self.batches.accumulation_steps).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, settings.optimizer.clip)
        # Of sharded weights it is a DTensor, whose parts in all processes `full_tensor` puts together.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        lr = self.state.update(self.weights)
        # The only wait for the GPU, once it has all of the step to do: a run that diverged ends before it is saved.
        row = {"step": self.step + 1, "lr": lr} | self._gather(torch.cat(losses).detach(), norm)
        self.step = self.state.step = self.step + 1
        tokens = math.prod(self.base.geometry.grid_of(batch.latents.shape[2:]))
        row |= speed(settings.batch_size, tokens, time.perf_counter() - start)
        return row | {"waited": waited, "memory_gib": peak_bytes(self.device) / GIB}

    def _losses(self, batch: LatentBatch) -> Tensor:
        """The loss of each clip of a micro-batch, (B,)."""
        inputs = add_noise(batch.latents, batch.noise, batch.sigmas), batch.sigmas, batch.text
        with self._autocast():
            if self.teacher is None:
                target = batch.noise - batch.latents
            else:
                with torch.no_grad():
                    target = predict_velocity(self.teacher, *inputs)
            return mse_per_clip(predict_velocity(self.model, *inputs), target, batch.sigmas)

    def _gather(self, losses: Tensor, norm: Tensor) -> dict[str, float]:
        """The mean loss of the whole batch, the gradient's norm, and unless dense the share of blocks kept.

        losses: (micro-batches x B,) of this process's clips; norm: 0-d, the same in all processes
        Raises `Diverged`. A wish to stop is told to all processes on the way.
        """
        shares = [layer.density for layer in self.transformer.nabla.sparse]
        kept = torch.stack(shares).mean() if shares else losses.new_ones(())
        # One exchange a step: a row a process of its losses in order and, last, the three values that are not per clip.
        said = torch.stack((norm, kept, losses.new_full((), self._asks_to_stop)))
        gathered = self.accelerator.gather(torch.cat((losses, said))[None]).cpu()
        # One wish is enough, and all processes see it in the same step: one that went on alone would wait for the
        # others.
        self.stops = bool(gathered[:, -1].any())
        micro_batches, processes = self.batches.accumulation_steps, self.accelerator.num_processes
        # (processes, micro-batches x clips) -> (micro-batches, processes, clips): the order of `MicroBatches.numbers`,
        # which `_where` names clips by.
        in_order = gathered[:, :-3].view(processes, micro_batches, -1).transpose(0, 1).flatten()
        if not in_order.isfinite().all():
            raise Diverged(self._where(in_order))
        loss, norm = in_order.mean().item(), gathered[0, -3].item()
        if not math.isfinite(norm):
            raise Diverged(f"step {self.step + 1}: the gradient's norm is {norm}, though the loss is {loss:.4g}")
        row = {"loss": loss, "grad_norm": norm}
        return row | {"kept": gathered[:, -2].mean().item()} if shares else row

    def _where(self, losses: Tensor) -> str:
        """A line that names what is not finite among the losses of a batch, (batch_size,)."""
        places = (~losses.isfinite()).nonzero().flatten().tolist()
        bad = [f"{losses[place]} {self.batches.describe(self.step, place)}" for place in places]
        return f"step {self.step + 1}: the loss is not finite: {'; '.join(bad)}"

    def _evaluate(self) -> dict[str, float]:
        is_due = self.step == self.steps or self.step % self.settings.every.validation == 0
        return self._validate() if is_due else {}

    def _log_line(self, row: dict[str, Any]) -> str | None:
        if row["step"] % self.settings.every.log and not any(key.startswith("validation") for key in row):
            return None
        return ", ".join(f"{key} {value:.5g}" for key, value in row.items())

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        held_out, own = self.validation, self.settings
        if held_out is None:
            return {}
        with self._inference():
            losses = validation_losses(
                self.transformer, held_out, own.data.clips, own.micro_batch, own.objective, self.accelerator, self.step
            )
        return {f"validation_{name}": loss for name, loss in losses.items()}

    def _after_step(self) -> None:
        """Videos of the prompts, when they are due."""
        if self.sampler is None or (self.step < self.steps and self.step % self.settings.every.sample):
            return
        with self._inference():
            folder = self.folder / "samples" / f"step-{self.step:08d}"
            self.sampler.write(self.transformer, folder, self.accelerator)

    def _save(self) -> None:
        """A checkpoint: the state to go on from, and weights and moving averages as generate.py takes them."""
        # A step of finite gradients may still overflow.
        own = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in self.weights)
        finite = torch.stack([part.detach().isfinite().all() for part in own]).all()
        if not self.accelerator.gather(finite.float()[None]).all():
            raise Diverged(f"after step {self.step}: weights are not finite")
        with collective_write(self.accelerator, self.folder):
            if self.unwritten is not None:
                # Within `collective_write`, so that all processes raise what one of them could not write.
                raise self.unwritten
        with self.checkpoints.new(self.step) as folder:
            self.state.save(folder)
            self._export(folder / "model")
            if self.state.ema is not None:
                with ema_weights(self.weights, self.state.ema):
                    self._export(folder / "ema")

    def _export(self, folder: Path) -> None:
        """Write the weights as they are now; of LoRA, merged ones at the end alone."""
        is_lora = self.settings.lora is not None
        # A gather that all processes take part in, though the first alone writes.
        state = full_state_dict(self.transformer, trained_only=is_lora)
        with collective_write(self.accelerator, self.checkpoints.folder):
            if self.accelerator.is_main_process:
                provided, is_last = self.folder / "parts", self.step == self.steps
                write_weights(folder, self.transformer, state, self.base, self.facts, self.settings, provided, is_last)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """The transformer as it would be used: its moving averages, if there are any, in the run's precision."""
        self.transformer.eval()
        try:
            with ema_weights(self.weights, self.state.ema), self._autocast():
                yield
        finally:
            self.transformer.train()

    def _autocast(self) -> torch.autocast:
        # Without its cache, which would hold a copy of all weights.
        dtype = getattr(torch, self.settings.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
