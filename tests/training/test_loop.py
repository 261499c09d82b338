"""The loop of training alone: what it does after which steps, and how it ends."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

from nabla import InputError
from wan.training.loop import TrainingLoop
from wan.training.metrics import Metrics, read_metrics


class Counting(TrainingLoop):
    """Says what it is asked for, in order."""

    def __init__(self, folder, steps: int, save_every: int | None = None, stop_after: int | None = None):
        super().__init__(steps, save_every)
        self.metrics, self.stop_after, self.asked = Metrics(folder, 0), stop_after, []

    def run(self) -> list[str]:
        with self.signal:
            self._train(itertools.count())
        return self.asked

    def _step(self, batches) -> dict[str, Any]:
        next(batches)
        self.step += 1
        self.signal.asked = self.step == self.stop_after
        self.stops = self._asks_to_stop
        self.asked.append(f"step {self.step}")
        return {"step": self.step}

    def _evaluate(self) -> dict[str, Any]:
        return {"ends": self._ends}

    def _log_line(self, row: dict[str, Any]) -> str | None:
        return None

    def _after_step(self) -> None:
        self.asked.append("after")

    def _save(self) -> None:
        if self.unwritten is not None:
            raise self.unwritten
        self.asked.append("save")


def test_states_are_saved_when_due_and_once_after_the_last_step(tmp_path):
    asked = Counting(tmp_path, steps=4, save_every=2).run()
    assert asked == ["step 1", "after", "step 2", "after", "save", "step 3", "after", "step 4", "after", "save"]
    assert [row["ends"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [False, False, False, True]
    assert Counting(tmp_path, steps=2).run() == ["step 1", "after", "step 2", "after", "save"]


def test_a_signal_and_the_end_of_the_time_stop_after_a_step_that_is_saved(tmp_path):
    run = Counting(tmp_path, steps=9, save_every=5, stop_after=2)
    assert run.run()[-3:] == ["step 2", "after", "save"] and run.stops
    assert str(run._stopped()) == "stopped after step 2; start again in the same way to go on"
    run = Counting(tmp_path, steps=9)
    run.deadline = time.monotonic()
    assert run.run() == ["step 1", "after", "save"]


def test_what_could_not_be_written_ends_the_run_before_its_next_state(tmp_path, monkeypatch):
    run = Counting(tmp_path, steps=9)
    write = run.metrics.write

    def full(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise InputError("the disk is full")
        write(row)

    monkeypatch.setattr(run.metrics, "write", full)
    with pytest.raises(InputError, match="the disk is full"):
        run.run()
    # The step after it is where all processes are told.
    assert run.asked[-2:] == ["step 4", "after"] and "save" not in run.asked
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
