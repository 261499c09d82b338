"""Who asks for videos on the page, and how many each may have waiting."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from nabla import InputError
from wan.serve.jobs.job import Job, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.limits import Visitor
from wan.serve.page.visible import OWNER

# Of videos that wait: of everyone, of an address, of one session of a browser.
MAX_WAITING, MAX_OF_ADDRESS, MAX_OF_SESSION = 20, 10, 4


class Visits:
    """The jobs that each session of a browser asked for, until they end."""

    def __init__(self, queue: Queue):
        self.queue = queue
        self._asked: dict[Visitor, list[str]] = {}
        self._lock = threading.Lock()

    def submit(self, visitor: Visitor, wish: Wish, uploads: Mapping[str, bytes]) -> Job:
        """Ask for a video. Raises `InputError` if too many wait, and as `Queue.submit` does."""
        # In one go, else who asks many times at once would be counted before any of the jobs is there.
        with self._lock:
            self._asked = {one: going for one in self._asked if (going := [job.id for job in self.going(one)])}
            check_waiting([one for one, jobs in self._asked.items() for _ in jobs], visitor)
            [job] = self.queue.submit([wish], uploads)
            self._asked.setdefault(visitor, []).append(job.id)
            return job

    def going(self, visitor: Visitor) -> list[Job]:
        """A session's jobs that have not ended, the first that was asked for first."""
        jobs = [self.queue.get(job_id, OWNER) for job_id in self._asked.get(visitor, ())]
        return [job for job in jobs if job is not None and not job.status.has_ended]

    def cancel(self, visitor: Visitor) -> None:
        """Delete all of a session's jobs that have not ended."""
        # The last first, so that none begins. Under the lock, so that none that is asked for meanwhile is passed over.
        with self._lock:
            for job in reversed(self.going(visitor)):
                self.queue.delete(job.id, OWNER)


def check_waiting(visitors: Sequence[Visitor], visitor: Visitor) -> None:
    """Raise `InputError` if a visitor may not have one more job beside those of `visitors`, of which one runs."""
    # Beyond the limit only at one more, since one of those counted may be the one that runs.
    if visitors.count(visitor) > MAX_OF_SESSION:
        raise InputError(f"{MAX_OF_SESSION} of your videos are waiting already; try again when one is made")
    if sum(one.address == visitor.address for one in visitors) > MAX_OF_ADDRESS:
        raise InputError(f"{MAX_OF_ADDRESS} videos from your address are waiting; try again when one is made")
    if len(visitors) > MAX_WAITING:
        raise InputError(f"{MAX_WAITING} videos are waiting already; try again later")
