"""Jobs and their files together: what is asked by those who want videos, and by those who make them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan.serve.jobs.files import JobFiles
from wan.serve.jobs.job import Job, JobError, Wish, new_id
from wan.serve.jobs.sqlite import SqliteStore
from wan.serve.jobs.store import JobStore, Listed, QueueLimits
from wan.serve.workers.messages import InputFile, Made, Order, Progress

DATABASE = "jobs.sqlite"
PREVIEW = "preview.jpg"
# How often the process that makes a video may end before the video is held to be the reason.
MOST_DEATHS = 3
# How often a job that is waited for is looked at, in seconds: another process may change it.
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Queue:
    """Jobs in a store, and their files. Used by several threads and processes at once.

    keep_seconds: how long a job is kept after its end; None for ever
    """

    store: JobStore
    files: JobFiles
    limits: QueueLimits = QueueLimits()
    keep_seconds: float | None = None

    @classmethod
    def open(cls, folder: Path, **options: Any) -> Queue:
        """The queue of a folder, which is made if it is not there, with the fields above. Raises `InputError`."""
        files = JobFiles(folder)
        return cls(SqliteStore(folder / DATABASE), files, **options)

    # Asked by clients.

    def submit(self, wishes: Sequence[Wish], uploads: Mapping[str, bytes] | None = None) -> Sequence[Job]:
        """Take in the jobs of one request, all or none, each with the files that were sent, by their names.

        Of an idempotency key that is known, which all wishes have, the jobs that are there already are given.
        Raises `QueueFull` and `StorageError`.
        """
        jobs = [Job(new_id(), wish, time.time()) for wish in wishes]
        taken: Sequence[Job] = []
        try:
            for job in jobs:
                # Before the job, which is made as soon as it is there.
                self.files.keep(job.id, uploads or {})
            taken = self.store.add(jobs, self.limits)
        finally:
            for job in jobs:
                if job not in taken:
                    self.files.delete(job.id)
        return taken

    def get(self, job_id: str, owner: str) -> Job | None:
        """A job of an owner; None if there is none of this id, and for another's."""
        job = self.store.get(job_id)
        return job if job is not None and job.wish.owner == owner else None

    def list(self, owner: str, **which: Any) -> Listed:
        """Jobs of an owner, see `JobStore.list`."""
        return self.store.list(owner, **which)

    def delete(self, job_id: str, owner: str) -> bool:
        """Remove a job of an owner and its files; whoever makes it hears so. False if there is none."""
        return self.get(job_id, owner) is not None and self.remove(job_id)

    def remove(self, job_id: str) -> bool:
        """Remove a job of anyone and its files; False if there is none."""
        # The job first: one that is there has its files.
        is_removed = self.store.delete(job_id)
        self.files.delete(job_id)
        return is_removed

    def wait(self, job_id: str, owner: str, seconds: float) -> Job | None:
        """A job once it has ended, or as it is after some seconds; None if it is deleted."""
        until = time.monotonic() + seconds
        while (job := self.get(job_id, owner)) and not job.status.has_ended and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        return job

    # Asked by whoever makes videos. False if a job was deleted: its files are, and its making can end.

    def claim(self) -> Job | None:
        """The job whose turn it is, which is in progress from now on; None if none waits."""
        return self.store.claim()

    def order(self, job: Job) -> Order:
        """What a replica is told of a job. Raises `FileNotFoundError` if files of it are gone, as of one deleted."""
        inputs = {name: InputFile(file, self.files.read(job.id, file)) for name, file in job.wish.inputs.items()}
        return Order(job.id, job.wish.layer, inputs)

    def tell(self, job_id: str, progress: Progress) -> bool:
        """How far a job in progress is. Raises `StorageError`."""
        if progress.preview is not None:
            self.files.keep(job_id, {PREVIEW: progress.preview})
        told = self.store.tell(
            job_id,
            stage=progress.stage,
            step=progress.step,
            steps=progress.steps,
            seconds_left=progress.seconds_left,
            notes=progress.notes,
        )
        return self._or_gone(job_id, told)

    def finish(self, job_id: str, made: Made) -> bool:
        """A job in progress is completed, with what was made. Raises `StorageError`."""
        self.files.keep(job_id, made.files)
        news = {
            "settings": made.settings,
            "files": [*made.files],
            "seconds": made.seconds,
            "peak_bytes": made.peak_bytes,
            "kept": made.kept,
        }
        self._forget_preview(job_id)
        return self._or_gone(job_id, self.store.finish(job_id, news, self._expiry()))

    def fail(self, job_id: str, error: JobError) -> bool:
        """A job in progress has failed."""
        self._forget_preview(job_id)
        return self._or_gone(job_id, self.store.fail(job_id, error, self._expiry()))

    def give_back(self, job: Job, died: str | None = None) -> bool:
        """A job in progress waits again, since it could not be ended here.

        died: how the process that made it ended, if it did; after several times the job has failed
        """
        if died is not None and job.died + 1 >= MOST_DEATHS:
            times = f"the process that made this video ended {MOST_DEATHS} times: {died}"
            return self.fail(job.id, JobError("worker_died", times))
        self._forget_preview(job.id)
        return self._or_gone(job.id, self.store.give_back(job.id, died is not None))

    def close(self) -> None:
        self.store.close()

    def _expiry(self) -> float | None:
        return None if self.keep_seconds is None else time.time() + self.keep_seconds

    def _forget_preview(self, job_id: str) -> None:
        self.files.path(job_id, PREVIEW).unlink(missing_ok=True)

    def _or_gone(self, job_id: str, is_there: bool) -> bool:
        if not is_there:
            # Written since the job was deleted.
            self.files.delete(job_id)
        return is_there
