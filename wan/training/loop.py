"""The loop of a training run that may end after any step, and goes on from there when it is started again."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nabla import InputError
from wan.training.metrics import Metrics
from wan.training.shutdown import Stopped, StopSignal

log = logging.getLogger("wan")


class TrainingLoop(ABC):
    """Steps, rows of metrics and states of a run; a subclass says what a step is, what is measured and what is saved.

    It sets `step`, of the state that the run goes on from, and in the process that writes them `metrics`, and then
    calls `_train` while `signal` is entered.

    steps: of the whole run; save_every: steps between two states, or None for no state but that after the last step
    """

    def __init__(self, steps: int, save_every: int | None = None):
        self.steps, self.save_every = steps, save_every
        self.step = 0
        self.signal = StopSignal()
        # On the clock of `time.monotonic`.
        self.deadline = math.inf
        # Whether the step just done is one to stop after: agreed upon by all processes, whose wishes may differ.
        self.stops = False
        self.metrics: Metrics | None = None
        # What this process alone could not write. Raised at once, it would leave the others waiting.
        self.unwritten: InputError | None = None

    def _train(self, batches: Iterator[Any]) -> None:
        """Steps until the last, or until the processes agree to stop, and then the state to go on from.

        Raises `Diverged`, or `InputError` if something could not be written; no state is written then.
        """
        while self.step < self.steps and not self.stops:
            # All processes walk through this alike; what one of them alone does must be in `_deferred` or a collective
            # write.
            row = self._step(batches)
            self._write(row | self._evaluate())
            self._after_step()
            # The state after the last step is written below, once.
            is_due = self.save_every is not None and self.step % self.save_every == 0
            if is_due and not self._ends:
                self._save()
        self._save()

    @property
    def _ends(self) -> bool:
        """Whether no step comes after the one just done."""
        return self.stops or self.step == self.steps

    @property
    def _asks_to_stop(self) -> bool:
        """Whether this process wishes to stop, which all processes are to be told."""
        # A deadline may pass between the looks of two processes, and a signal may reach one of them only.
        return self.signal.asked or self.unwritten is not None or time.monotonic() > self.deadline

    def _stopped(self) -> Stopped:
        return Stopped(f"stopped after step {self.step}; start again in the same way to go on")

    @contextmanager
    def _deferred(self) -> Iterator[None]:
        """Keep what this process cannot write until all processes are to raise it, with the next state."""
        try:
            yield
        except InputError as error:
            self.unwritten = self.unwritten or error

    def _write(self, row: dict[str, Any]) -> None:
        """A row into the metrics and, where it is due, the log; nothing more once something could not be written."""
        if self.metrics is None or self.unwritten is not None:
            return
        if line := self._log_line(row):
            log.info(line)
        with self._deferred():
            self.metrics.write(row)

    @abstractmethod
    def _step(self, batches: Iterator[Any]) -> dict[str, Any]:
        """One step of the optimizer on the next of the batches, and its row of metrics; sets `step` and `stops`.

        Raises `Diverged`.
        """

    @abstractmethod
    def _evaluate(self) -> dict[str, Any]:
        """What is measured after this step, for its row."""

    @abstractmethod
    def _log_line(self, row: dict[str, Any]) -> str | None:
        """What the log says of a row, if anything."""

    def _after_step(self) -> None:  # noqa: B027  there need not be anything
        """What else there is to do once a step's row is written."""

    @abstractmethod
    def _save(self) -> None:
        """Write the state to go on from; raises `unwritten`, in all processes, before anything is written."""
