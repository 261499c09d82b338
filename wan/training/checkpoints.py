"""Checkpoints of a run: whole or not there, the last k kept, with the state that an exact continuation needs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nabla import InputError
from wan.files.atomic import PARTIAL, atomic_path, lock_folder, remove, settle, sync
from wan.training.dcp_states import SafePlanner, SafeReader
from wan.training.state_file import reason_of
from wan.training.write_errors import collective_write, state_write

STATE = "state"
LATEST = "latest"
# In states, that of AdamW last.
SCHEDULE_KEYS = ("matrix_schedule", "schedule")


class CheckpointManager:
    """The folders `checkpoints/step-...` of a run, and the link `latest` to the last of them.

    The first process holds the run's folder until `close`. Raises `InputError` if it cannot be written or is in use.
    """

    def __init__(self, run: Path, keep: int, accelerator: Accelerator):
        self.lock: TextIO | None = None
        self.run, self.keep, self.accelerator = run, keep, accelerator
        self.folder = run / "checkpoints"
        refused: list[str | None] = [None]
        if accelerator.is_main_process:
            try:
                self._take()
            except InputError as error:
                refused = [str(error)]
        # All end with the same line: of those who wait for one that has ended, each would fail in another way.
        if why := broadcast_object_list(refused)[0]:
            raise InputError(why)

    def _take(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.run)
        except OSError as error:
            raise InputError(f"out {self.run} cannot be written ({error.strerror}); choose another") from None
        # The lock is held, so nobody is writing these any more.
        for left in self.folder.glob(f"{PARTIAL}*"):
            remove(left)
        self._link()

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def last(self) -> Path | None:
        """The checkpoint of the highest step, or None."""
        # Steps have leading zeros, so paths sort as numbers do.
        return max(self.folder.glob("step-*"), default=None)

    @contextmanager
    def new(self, step: int) -> Iterator[Path]:
        """A folder for all processes to write the checkpoint of a step to, which counts once the body has succeeded.

        Nothing is left of it otherwise. Raises `InputError`, in all processes, if it cannot be written.
        """
        # Not by `atomic_path`: all processes write into it, so its name must be one that they all know.
        path = self.folder / f"step-{step:08d}"
        partial = path.with_name(PARTIAL + path.name)
        leads = self.accelerator.is_main_process
        try:
            with collective_write(self.accelerator, path):
                if leads:
                    remove(partial)
                    partial.mkdir()
            yield partial
            # Others may still be writing into it.
            self.accelerator.wait_for_everyone()
            with collective_write(self.accelerator, path):
                if leads:
                    settle(partial)
                    self._place(partial, path)
        except BaseException:
            if leads:
                # What is left then was on the disk that failed, and is swept by the next start.
                with suppress(OSError):
                    remove(partial)
            raise

    def _place(self, partial: Path, path: Path) -> None:
        os.replace(partial, path)
        sync(self.folder)
        self._link()
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            # Under its own name it would look whole if this were cut.
            os.replace(old, old.with_name(PARTIAL + old.name))
            remove(old.with_name(PARTIAL + old.name))

    def _link(self) -> None:
        """Let `latest` lead to the last checkpoint, after a cut between the two as well."""
        last = self.last()
        if last is not None:
            with atomic_path(self.run / LATEST) as link:
                link.symlink_to(last.relative_to(self.run))


class TrainState:
    """What changes over a run, and can be saved and read back by any number of processes: see torch's `Stateful`.

    optimizers, schedules: AdamW and its own last, one of the blocks' matrices before it or none
    """

    def __init__(
        self,
        transformer: nn.Module,
        optimizers: list[Optimizer],
        schedules: list[LRScheduler],
        ema: EMAModel | None,
    ):
        self.transformer, self.optimizers, self.ema = transformer, optimizers, ema
        self.schedules = dict(zip(SCHEDULE_KEYS[-len(schedules) :], schedules, strict=True))
        self.step = 0
        # In the order of the transformer's parameters, which is that of the averages: they are saved under these names.
        trained = {name: weight.requires_grad for name, weight in transformer.named_parameters()}
        self.trained = [name for name, is_trained in trained.items() if is_trained]
        # Frozen weights are not saved, and so missed where all are asked for.
        self.options = StateDictOptions(
            ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=all(trained.values())
        )

    def update(self, weights: list[nn.Parameter]) -> float:
        """A step of the optimizers and of the moving averages of the weights; returns the rate of AdamW in it."""
        # Before the schedules go on to the next step's.
        lr = self.schedules[SCHEDULE_KEYS[-1]].get_last_lr()[0]
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in self.schedules.values():
            schedule.step()
        if self.ema is not None:
            self.ema.step(weights)
        return lr

    def state_dict(self) -> dict[str, Any]:
        # Names of parameters in place of numbers, and DTensors as they are, so that another number of processes can
        # read it.
        model, optimizer = get_state_dict(self.transformer, self.optimizers, options=self.options)
        state = {"model": model, "optimizer": optimizer, "step": self.step}
        state |= {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        if self.ema is not None:
            state["ema"] = dict(zip(self.trained, self.ema.shadow_params))
            state["ema_steps"] = self.ema.optimization_step
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # dcp.load has read tensors into those that `state_dict` gave it; optimizers and what is no tensor are handed
        # over here.
        set_state_dict(
            self.transformer,
            self.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self.options,
        )
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state[name])
        self.step = state["step"]
        if self.ema is not None:
            # Its tensors were read in place.
            self.ema.optimization_step = state["ema_steps"]

    def save(self, checkpoint: Path) -> None:
        """Raises `InputError`, in all processes, if one of them cannot write."""
        with _without_warning_of_one_process(), _without_root_log(), state_write(checkpoint.parent):
            dcp.save({STATE: self}, checkpoint_id=checkpoint / STATE)

    def load(self, checkpoint: Path) -> None:
        """Raises `InputError` if the state of a checkpoint is damaged, or another's. No code in it is run."""
        reader = SafeReader(checkpoint / STATE)
        try:
            with _without_warning_of_one_process(), _without_root_log():
                dcp.load({STATE: self}, storage_reader=reader, planner=SafePlanner())
            # A state copied from another checkpoint would fit in all shapes.
            if self.step != _step_of(checkpoint):
                raise ValueError(f"it is of step {self.step}")
        except dcp.CheckpointException as error:
            # A failure and its traceback for each process that had one.
            failure, _ = next(iter(error.failures.values()))
            raise _damaged(checkpoint, reader.failure or failure) from error
        except ValueError as error:
            raise _damaged(checkpoint, error) from error


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _damaged(checkpoint: Path, failure: BaseException) -> InputError:
    return InputError(
        f"{checkpoint / STATE} is damaged ({reason_of(failure)}); remove {checkpoint} to go on from the one before it"
    )


@contextmanager
def _without_root_log() -> Iterator[None]:
    """Without what torch itself logs, with tracebacks, of files that it then raises an error for."""
    # A logger's filters see only what is logged to it itself, as torch does here; lines of other loggers pass.
    root = logging.getLogger()
    root.addFilter(_nothing)
    try:
        yield
    finally:
        root.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False


@contextmanager
def _without_warning_of_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
