"""Which jobs of the folder a visitor of the page sees."""

from __future__ import annotations

from dataclasses import dataclass

from wan.serve.jobs.job import Job
from wan.serve.jobs.queue import PREVIEW, Queue
from wan.serve.jobs.store import Listed
from wan.serve.limits import Visitor

# Jobs of nobody in particular: the page asks for no token, so that it shows none of a token's.
OWNER = ""


@dataclass(frozen=True)
class VisibleJobs:
    """The jobs of a queue as visitors see them.

    everyones: whether all see those of all, as where none but this machine reaches the page; else those that were asked
    for from the visitor's own address
    """

    queue: Queue
    everyones: bool

    def get(self, job_id: str, visitor: Visitor) -> Job | None:
        """None if there is no such job, and for one that the visitor does not see."""
        job = self.queue.get(job_id, OWNER)
        return job if job is not None and (self.everyones or job.wish.source == visitor.address) else None

    def list(self, visitor: Visitor, limit: int) -> Listed:
        """The newest jobs, the last to come first."""
        return self.queue.list(OWNER, limit=limit, source=None if self.everyones else visitor.address)

    def delete(self, job_id: str, visitor: Visitor) -> bool:
        """Remove a job and its files, and have its making end; False if there is none that the visitor sees."""
        return self.get(job_id, visitor) is not None and self.queue.delete(job_id, OWNER)

    def preview_time(self, job: Job) -> int | None:
        """When the preview of a job was written, which tells two of one job apart; None if there is none."""
        try:
            return self.queue.files.path(job.id, PREVIEW).stat().st_mtime_ns
        except FileNotFoundError:
            return None
