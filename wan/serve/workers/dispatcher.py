"""Who hands the jobs that wait to the replicas, and writes down what becomes of them."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from nabla import InputError
from wan.serve.jobs.job import Job, JobError, Status
from wan.serve.jobs.queue import Queue
from wan.serve.jobs.store import StorageError
from wan.serve.workers.messages import EVENTS_AT_THE_END, Event, Failed, Made, Order, Progress
from wan.serve.workers.replica import Engine, Replica, ReplicaDied

T = TypeVar("T")

log = logging.getLogger("wan")

# How long what is new may go unnoticed: a job that came, one that was deleted, a queue that grew.
LOOK_SECONDS = 0.05
# Between two tries of what failed through no job: the first time, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
# What a thread may take to give its job back at the end.
GRACE_SECONDS = 10.0


class Dispatcher:
    """Hands the jobs of a queue to the replicas of an engine, from when it is entered as a context until it is left.

    Only one process may dispatch the jobs of a folder: those in progress that it finds there are taken to be left over.
    """

    def __init__(self, queue: Queue, engine: Engine):
        self.queue, self.engine = queue, engine
        self._threads: list[_ReplicaThread] = []
        self._ending = threading.Event()
        self._manager = threading.Thread(target=self._manage, name="dispatcher", daemon=True)

    def __enter__(self) -> Dispatcher:
        if left := self.queue.store.give_back_all():
            log.info("jobs that were being made when the last server ended, and wait again: %d", left)
        self._manager.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all replicas at once. The jobs that they were making wait for the next server."""
        self._ending.set()
        self._manager.join()
        for thread in self._threads:
            thread.leaving.set()
        for thread in self._threads:
            # The others may wait for a place in a cluster, and that ends with the engine.
            if thread.has_replica:
                thread.join(GRACE_SECONDS)
        self.engine.close()

    def is_alive(self) -> bool:
        """Whether jobs are given out."""
        return self._manager.is_alive()

    def _manage(self) -> None:
        """Have as many replicas as the engine wants for the jobs that there are."""
        while not self._ending.wait(LOOK_SECONDS):
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            jobs = _surely(lambda: self.queue.store.count((Status.QUEUED, Status.IN_PROGRESS)), self._ending)
            if jobs is not None:
                self._have(self.engine.wanted(jobs[Status.QUEUED], jobs[Status.IN_PROGRESS]))

    def _have(self, wanted: int) -> None:
        staying = [thread for thread in self._threads if not thread.leaving.is_set()]
        idle = [thread for thread in staying if not thread.is_making]
        # Those first that are still without a replica, for others have a model loaded.
        idle.sort(key=lambda one: one.has_replica)
        for thread in idle[: max(0, len(staying) - wanted)]:
            thread.leaving.set()
        for _ in range(wanted - len(staying)):
            self._threads.append(_ReplicaThread(self.queue, self.engine, self._ending))
            self._threads[-1].start()


class _ReplicaThread(threading.Thread):
    """Keeps a replica, started again whenever it is lost, and has it make one job after another until it is to leave.

    ending: set where a job that is being made should not even be ended
    """

    def __init__(self, queue: Queue, engine: Engine, ending: threading.Event):
        super().__init__(name="replica", daemon=True)
        self.queue, self.engine, self.ending = queue, engine, ending
        self.leaving = threading.Event()
        self.has_replica = self.is_making = False

    def run(self) -> None:
        pause = FIRST_PAUSE
        while not self.leaving.is_set():
            self.has_replica = False
            try:
                with closing(self.engine.start_replica()) as replica:
                    pause = FIRST_PAUSE
                    self.has_replica = True
                    self._make_jobs(replica)
            except Exception as error:
                _report("no process that makes videos could be started", error)
                self.leaving.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _make_jobs(self, replica: Replica) -> None:
        """Until the replica is to leave, or makes no more."""
        is_usable = True
        while is_usable and not self.leaving.is_set():
            job = _surely(self.queue.claim, self.leaving)
            if job is None:
                self.leaving.wait(LOOK_SECONDS)
                continue
            self.is_making = True
            is_usable = self._make(job, replica)
            self.is_making = False

    def _make(self, job: Job, replica: Replica) -> bool:
        """Have a job made, and write down what it came to; gives whether the replica can make another."""
        try:
            order = self.queue.order(job)
        except OSError as error:
            # Mostly of a job that was deleted just now. It is nothing of the replica's, whose model stays loaded.
            log.warning("warning: %s could not be begun: %s", job.id, error)
            gone = JobError("internal_error", "the files that it should be made from are gone")
            self._write(lambda: self.queue.fail(job.id, gone))
            return True
        try:
            end = self._watch(job, order, replica)
        except ReplicaDied as error:
            died = str(error)
            log.warning("warning: %s while it made %s", died, job.id)
            self._write(lambda: self.queue.give_back(job, died))
            return False
        except Exception as error:
            _report(f"{job.id} could not be made", error)
            self._write(lambda: self.queue.fail(job.id, JobError("internal_error", "the server failed to make it")))
            return False
        match end:
            case Made():
                self._write(lambda: self._finish(job, end))
            case Failed():
                log.warning("warning: %s failed: %s", job.id, end.message)
                self._write(lambda: self.queue.fail(job.id, JobError(end.code, end.message)))
                return not end.broken
            case _:
                # Deleted, so that only its files go; or the server ends.
                self._write(lambda: self.queue.give_back(job))
        return end is not None

    def _watch(self, job: Job, order: Order, replica: Replica) -> Event | None:
        """What a job came to; None if the server ends before. Raises `ReplicaDied`."""
        replica.start(order)
        is_aborted = False
        while not self.ending.is_set():
            event = replica.poll(LOOK_SECONDS)
            # Steps may be faster than what is written down of them: only the last is of interest.
            while isinstance(event, Progress) and (newer := replica.poll(0)) is not None:
                event = newer
            if isinstance(event, EVENTS_AT_THE_END):
                return event
            if not is_aborted and not self._is_wanted(job, event):
                replica.abort()
                is_aborted = True
        return None

    def _is_wanted(self, job: Job, progress: Progress | None) -> bool:
        """Whether a job is still to be made, after it was written down how far it is."""
        try:
            return self.queue.store.get(job.id) is not None if progress is None else self.queue.tell(job.id, progress)
        except Exception as error:
            # Where a disk is full for a while, the video is worth more than its progress.
            _report(f"it could not be written down how far {job.id} is", error)
            return True

    def _finish(self, job: Job, made: Made) -> bool:
        try:
            return self.queue.finish(job.id, made)
        except StorageError as error:
            return self.queue.fail(job.id, JobError("internal_error", str(error)))

    def _write(self, write: Callable[[], bool]) -> None:
        _surely(write, self.ending)


def _surely(ask: Callable[[], T], ending: threading.Event) -> T | None:
    """What a store answers, once it does: its disk may be full for a while. None if the server ends before."""
    pause = FIRST_PAUSE
    while True:
        try:
            return ask()
        except Exception as error:
            _report("jobs cannot be read or written", error)
        if ending.wait(pause):
            return None
        pause = min(2 * pause, LONGEST_PAUSE)


def _report(what: str, error: Exception) -> None:
    log.warning("warning: %s: %s", what, error)
    if not isinstance(error, (InputError, ReplicaDied, StorageError)):
        traceback.print_exception(error)
