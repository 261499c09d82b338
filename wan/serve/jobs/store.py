"""What keeps jobs. One interface, so that the machinery above it does not know which database it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from wan.serve.jobs.job import Job, JobError, Status


class QueueFull(Exception):
    """No further job is taken now. Its text says which limit is reached; retry_after: seconds until one may be."""

    def __init__(self, text: str, retry_after: int):
        super().__init__(text)
        self.retry_after = retry_after


class StorageError(Exception):
    """The disk does not take what should be kept, or not now. Its text says why, and names no folder."""


@dataclass(frozen=True)
class QueueLimits:
    """Jobs that may wait: of everyone, and of one source."""

    waiting: int = 1000
    of_source: int = 1000


class Listed(NamedTuple):
    """Some jobs of a list, and whether it has more behind them."""

    jobs: Sequence[Job]
    has_more: bool


class JobStore(Protocol):
    """Jobs on the disk, for several threads and processes at once. Each call is whole or has not happened.

    What a call has returned from is kept through a crash of the process, and of the machine. Each may raise
    `StorageError`.
    """

    def add(self, jobs: Sequence[Job], limits: QueueLimits) -> Sequence[Job]:
        """Take in jobs, all or none. Those of an idempotency key that is known are given as they are kept.

        Raises `QueueFull`.
        """
        ...

    def get(self, job_id: str) -> Job | None:
        """None for one that is not there, or was deleted."""
        ...

    def list(
        self,
        owner: str,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
        source: str | None = None,
    ) -> Listed:
        """Jobs of an owner by the time that they came, those behind the job `after`. Raises `KeyError` for an `after`
        that is not one of them.

        source: only those whose wish has it, if given
        """
        ...

    def claim(self) -> Job | None:
        """The job whose turn it is, which is in progress from now on; None if none waits."""
        ...

    def tell(self, job_id: str, **progress: Any) -> bool:
        """Change stage, step, steps, seconds_left or notes of a job in progress. False if it was deleted meanwhile."""
        ...

    def finish(self, job_id: str, made: Mapping[str, Any], expires_at: float | None) -> bool:
        """A job is completed: settings, files, seconds, peak_bytes, kept. False if it was deleted meanwhile."""
        ...

    def fail(self, job_id: str, error: JobError, expires_at: float | None = None) -> bool:
        """A job has failed. False if it was deleted meanwhile."""
        ...

    def give_back(self, job_id: str, died: bool) -> bool:
        """A job in progress waits again, at the place that it had. died: through the process that made it.

        False if it was deleted meanwhile.
        """
        ...

    def give_back_all(self) -> int:
        """All jobs in progress wait again, as when the server begins; gives their number."""
        ...

    def delete(self, job_id: str) -> bool:
        """A job is gone for whoever asks; whoever makes it is told by `tell`. False if it was not there."""
        ...

    def ahead(self, job_id: str) -> int:
        """How many jobs are made before a waiting one, those in progress included."""
        ...

    def count(self, statuses: Collection[Status] = tuple(Status)) -> Mapping[Status, int]:
        """Jobs by status; of those that wait and run alone it costs nothing for all that have ended."""
        ...

    def expired_by(self, time: float) -> Sequence[str]:
        """Ids of jobs that have expired by a time."""
        ...

    def ended_first(self) -> Sequence[str]:
        """Ids of jobs that have ended, the first that did first."""
        ...

    def close(self) -> None: ...
