"""The videos of a folder's queue are made: by one process a folder, which alone gives out its jobs and tidies it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from wan.files.atomic import lock_folder
from wan.serve.jobs.keeping import kept_tidy
from wan.serve.jobs.queue import Queue
from wan.serve.workers.dispatcher import Dispatcher
from wan.serve.workers.replica import Engine


@contextmanager
def making(queue: Queue, engine: Engine, most_bytes: int | None = None) -> Iterator[Dispatcher]:
    """Have the jobs of a queue made by an engine, and those removed that should go, until the context is left.

    most_bytes: that files of jobs may hold
    Raises `FolderInUse` if another process does so in that folder.
    """
    # Two would each take what the other makes for left over.
    with lock_folder(queue.files.folder), Dispatcher(queue, engine) as dispatcher, kept_tidy(queue, most_bytes):
        yield dispatcher
