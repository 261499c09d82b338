"""Jobs that have expired, and the oldest where all hold too much, are removed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import time

from wan.serve.jobs.queue import Queue

log = logging.getLogger("wan")

# How often, in seconds.
EVERY = 60.0


def tidy(queue: Queue, most_bytes: int | None = None) -> None:
    """Remove jobs that have expired, what is left of none, and those that ended first while files hold too much."""
    for job_id in queue.store.expired_by(time()):
        queue.remove(job_id)
    queue.files.sweep(queue.store.get)
    if most_bytes is None:
        return
    sizes = queue.files.sizes()
    held = sum(sizes.values())
    for job_id in queue.store.ended_first():
        if held <= most_bytes:
            break
        queue.remove(job_id)
        held -= sizes.get(job_id, 0)


@contextmanager
def kept_tidy(queue: Queue, most_bytes: int | None = None) -> Iterator[None]:
    """`tidy` every minute in a thread. For one process a folder, that which makes its videos."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(EVERY):
            try:
                tidy(queue, most_bytes)
            except Exception:
                # Such as of a disk that comes back; the server goes on without.
                log.exception("jobs that should go could not be removed")

    thread = threading.Thread(target=run, name="keeping", daemon=True)
    tidy(queue, most_bytes)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
